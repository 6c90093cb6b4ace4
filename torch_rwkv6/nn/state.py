"""The recurrent state of a model."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_rwkv6._torch_private import register_namedtuple
from torch_rwkv6.files import (
    StrPath,
    device_named,
    file_to_write,
    read_tensors,
    write_tensors,
)

__all__ = ["RWKVState"]


class RWKVState(NamedTuple):
    """The recurrent state of B sequences; its size does not depend on their length.

    A NamedTuple of tensors, so torch.compile, torch.export and torch.utils._pytree see through
    it. Its name is registered, so torch.export.save and torch.load (weights_only) accept it. Every
    method returns a new state.
    """

    att_shift: Tensor  # [L, B, D], the normed input of each time mixing at the last token
    wkv: Tensor  # [L, B, H, N, N], [key, value]; RWKV-4: [L, B, 3, D], see `torch_rwkv6.wkv4`
    ffn_shift: Tensor  # [L, B, D], the normed input of each channel mixing at the last token

    # wkv is float32, or float64 in a float64 model; the others have the model's dtype

    def detach(self) -> RWKVState:
        """The state without its gradient history: backpropagation through time is cut here."""
        return RWKVState(*(x.detach() for x in self))

    def clone(self) -> RWKVState:
        """A copy that shares no memory with this state."""
        return RWKVState(*(x.clone() for x in self))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RWKVState:
        """On another device, or for a model of another dtype.

        ``wkv`` becomes float64 for float64 and float32 for every other dtype: rounding it to 16
        bits at each hand-over would add up.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point torch.dtype, got {dtype!r}")
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
            TypeError: no integers.
            ValueError: not one dimension of them.
        """
        try:
            index = torch.as_tensor(rows, device=self.wkv.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"rows: expected a list of int, got {reprlib.repr(rows)}") from error
        if not isinstance(rows, Tensor) and index.numel() == 0:
            index = index.long()  # [] would be float32
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rows: expected int32 or int64 indices, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"rows: expected [B'], got shape {tuple(index.shape)}")
        return RWKVState(*(x[:, index] for x in self))

    def row(self, i: int) -> RWKVState:
        """Batch row i as a state of one row, in the memory of this one.

        Raises:
            IndexError: a row outside the batch.
        """
        return RWKVState(*(x[:, i].unsqueeze(1) for x in self))

    @classmethod
    def cat(cls, states: Sequence[RWKVState]) -> RWKVState:
        """Several states as one batch, in their order: the inverse of `select`.

        Raises:
            ValueError: no state at all.
        """
        if not len(states):
            raise ValueError("states: expected at least one, got none")
        return cls(*(torch.cat(tensors, 1) for tensors in zip(*states, strict=True)))

    def save(self, path: StrPath) -> None:
        """Writes the state to a file that `load` reads, and torch.load or safetensors as well.

        Args:
            path: ``.safetensors``, or any other name for a file of torch.save, in a folder that
                exists. The file appears when it is complete.

        Raises:
            ImportError: the package safetensors is missing.
            OSError: the folder is missing, or writing fails; a file that was there is unchanged.
            TypeError, ValueError: no path of a file.
        """
        target = file_to_write(path)
        whole = torch.contiguous_format  # of a view no more than it shows
        tensors = {
            n: x.detach().cpu().clone(memory_format=whole) for n, x in self._asdict().items()
        }
        write_tensors(tensors, target)

    @classmethod
    def load(cls, path: StrPath, device: torch.device | str | None = None) -> RWKVState:
        """The state that `save` wrote.

        Raises:
            ImportError: the package safetensors is missing.
            OSError: the file cannot be read.
            TypeError: device is none.
            ValueError: it holds no state; or this machine does not have the device.
        """
        device = device_named(device)
        content = read_tensors(Path(path), "saved RWKVState")
        if set(content) != set(cls._fields):
            raise ValueError(f"{path} is no saved RWKVState: expected the keys {cls._fields}")
        if not all(isinstance(x, Tensor) and x.is_floating_point() for x in content.values()):
            raise ValueError(f"{path} is no saved RWKVState: expected floating-point tensors")
        # memory of its own: the file may be mapped, and the state will be updated in place
        return cls(**{name: x.to(device, copy=True) for name, x in content.items()})

    def check_memory(self) -> None:
        """Raises ValueError where the state cannot be updated in place: elements share memory."""
        for name, x in self._asdict().items():
            if any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride())):
                raise ValueError(
                    f"state.{name}: expected memory of its own for every element, which is updated "
                    "in place, got an expanded view (RWKVState.clone copies)"
                )
        for (a, x), (b, y) in itertools.combinations(self._asdict().items(), 2):
            if share_memory(x, y):
                raise ValueError(
                    f"state.{a}: it is updated in place, but shares memory with state.{b} "
                    "(RWKVState.clone copies)"
                )


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether an element belongs to both tensors, as far as that can be told: on a CPU."""
    if type(x) is not Tensor or type(y) is not Tensor or not x.is_cpu or not y.is_cpu:
        return False
    if x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    of_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy has no bfloat16
    a, b = (t.detach().view(of_size[t.element_size()]).numpy() for t in (x, y))
    return bool(np.shares_memory(a, b))


torch.serialization.add_safe_globals([RWKVState])  # torch.load with weights_only, the default
register_namedtuple(RWKVState, serialized_type_name="torch_rwkv6.nn.RWKVState")
