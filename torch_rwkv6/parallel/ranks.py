"""The processes among which a sequence is cut, and what they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_rwkv6.arguments import tensor
from torch_rwkv6.checks import check_values


class Ranks:
    """A process group: its first rank has the first tokens, its last one the last."""

    def __init__(self, group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group: torch.distributed is not initialised; call init_process_group first"
            )
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: this process is not in it")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group: expected a torch.distributed.ProcessGroup (mesh.get_group() of a device "
                f"mesh), or None for all processes, got {type(group).__name__}"
            )
        self.group = group
        self.size = dist.get_world_size(group)
        self.own = dist.get_rank(group)

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor of all ranks, [ranks, ...], in one collective; their dtypes are the same."""
        if self.size == 1:
            return [x.unsqueeze(0) for x in tensors]
        own = torch.cat([x.flatten() for x in tensors])
        gathered = own.new_empty(self.size, own.numel())
        if own.numel():
            dist.all_gather(list(gathered), own, group=self.group)
        parts = gathered.split([x.numel() for x in tensors], 1)
        return [part.reshape(self.size, *x.shape) for part, x in zip(parts, tensors)]

    def own_offsets(self, cu_seqlens: Tensor, tokens: int) -> Tensor:
        """cu_seqlens of this rank's own piece: of the sequences elsewhere it has no token.

        Args:
            cu_seqlens: of all pieces joined, [M + 1], the same on all ranks.
            tokens: how many this rank has.
        """
        (lengths,) = self.gather(cu_seqlens.new_full((1,), tokens))  # [ranks, 1]
        if cu_seqlens.device.type == "cpu":
            check_values(int(lengths.sum()), 1, None, cu_seqlens)
        return (cu_seqlens - lengths[: self.own].sum()).clamp(0, tokens)


def check_local(names: Sequence[str], values: Sequence[Any]) -> None:
    """Raises TypeError for what is not this process's own tensor; None is left out."""
    for name, x in zip(names, values):
        if x is not None and hasattr(tensor(name, x), "to_local"):
            raise TypeError(
                f"{name}: expected this process's own piece, got a DTensor; pass x.to_local()"
            )


def flags(given: Tensor | None, records: bool, like: Tensor) -> Tensor:
    """What the ranks must agree on: whether a state is given, and whether autograd records.

    Empty on a GPU, where reading it would stall the stream.
    """
    if like.device.type != "cpu":
        return like.new_empty(0)
    return like.new_tensor([given is not None, records])


def check_flags(name: str, found: Tensor) -> None:
    """Raises on all ranks where those of one rank do not fit; on a GPU, reading them would stall.

    Args:
        name: the argument that only the first rank's value of counts.
        found: `flags` of all ranks, [ranks, 2].
    """
    if not found.numel():
        return
    given, records = found.bool().T.tolist()
    if any(given) and not given[0]:
        raise ValueError(
            f"{name}: expected on the first rank of the group, whose tokens are the first, got it "
            f"on rank {given.index(True)} and not on that. Pass it on the first rank or on all"
        )
    if any(records) and not all(records):
        raise ValueError(
            f"{name}: autograd records this call on rank {records.index(True)} of the group but "
            f"not on rank {records.index(False)}, so their backward passes would wait for each "
            "other: give the tensors the same requires_grad, and call all ranks or none under "
            f"torch.no_grad(). A {name} that needs a gradient is passed on all ranks"
        )
