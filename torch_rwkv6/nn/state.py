"""What a model remembers of the text so far."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_rwkv6._torch_private import register_namedtuple

__all__ = ["RWKVState"]


class RWKVState(NamedTuple):
    """Everything a model remembers of B sequences; its size does not grow with their length.

    A NamedTuple of tensors, so torch.compile, torch.export and torch.utils._pytree see through
    it. Its name is registered, so torch.export.save and torch.load (weights_only) accept it. Every
    method returns a new state.
    """

    att_shift: Tensor  # [L, B, D], the normed input of each time mixing at the last token
    wkv: Tensor  # [L, B, H, N, N], [key, value]; RWKV-4: [L, B, 3, D], see `torch_rwkv6.wkv4`
    ffn_shift: Tensor  # [L, B, D], the normed input of each channel mixing at the last token

    # wkv is float32, or float64 in a float64 model; the others have the model's dtype

    def detach(self) -> RWKVState:
        """Without its history: truncates backpropagation through time here."""
        return RWKVState(*(x.detach() for x in self))

    def clone(self) -> RWKVState:
        """A copy with memory of its own."""
        return RWKVState(*(x.clone() for x in self))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RWKVState:
        """On another device, or for a model of another dtype.

        ``wkv`` becomes float64 for float64 and float32 for every other dtype: rounding it to 16
        bits at each hand-over would add up.
        """
        wkv_dtype = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return RWKVState(
            self.att_shift.to(device=device, dtype=dtype),
            self.wkv.to(device=device, dtype=wkv_dtype),
            self.ffn_shift.to(device=device, dtype=dtype),
        )

    def select(self, rows: Tensor | Sequence[int]) -> RWKVState:
        """The states of the given batch rows, in that order; repeats are allowed (beam search).

        Args:
            rows: indices into the batch, int32 or int64 [B'] or a list of int.

        Raises:
            IndexError: an index outside the batch (on a GPU, an assertion of the device).
        """
        index = torch.as_tensor(rows, device=self.wkv.device)
        index = index.long() if index.numel() == 0 else index  # [] would be float32
        return RWKVState(*(x[:, index] for x in self))

    @classmethod
    def cat(cls, states: Sequence[RWKVState]) -> RWKVState:
        """Several states as one batch, in their order: the inverse of `select`."""
        return cls(*(torch.cat(tensors, 1) for tensors in zip(*states, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state to a file that `load` (or torch.load with weights_only) reads."""
        torch.save({n: x.detach().cpu().clone() for n, x in self._asdict().items()}, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str | None = None
    ) -> RWKVState:
        """The state that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no state.
        """
        try:
            content = torch.load(path, map_location=device or "cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # whatever the unpickler or unzipper met
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} is no saved RWKVState: {reason}") from error
        if not isinstance(content, dict) or set(content) != set(cls._fields):
            raise ValueError(f"{path} is no saved RWKVState: expected the keys {cls._fields}")
        return cls(**content)


torch.serialization.add_safe_globals([RWKVState])  # torch.load with weights_only, the default
register_namedtuple(RWKVState, serialized_type_name="torch_rwkv6.nn.RWKVState")
