"""Batching rules for torch.vmap: the mapped dimension is folded into the heads.

Heads (the channels of RWKV-4) are independent and every float tensor has them, u as well, so one
rule serves any mixture of mapped and shared tensors. Only a mapped state_map or cu_seqlens, which
say something about all heads at once, are taken one slice after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Where the heads are in each tensor argument; None marks the index tensors.
_HEADS = {
    "grad_y": 2,
    "grad_final_state": 1,
    "r": 2,
    "k": 2,
    "v": 2,
    "w": 2,
    "u": 0,
    "initial_state": 1,
    "state_map": None,
    "cu_seqlens": None,
}
_CHANNELS = {
    "grad_y": 2,
    "grad_final_state": 2,
    "k": 2,
    "v": 2,
    "w": 0,
    "u": 0,
    "initial_state": 2,
}


def _fold(x: Tensor | None, dim: int | None, heads: int, size: int) -> Tensor | None:
    """[..., H, ...] mapped along dim -> [..., size * H, ...]."""
    if x is None:
        return None
    x = (
        x.unsqueeze(heads).expand(*x.shape[:heads], size, *x.shape[heads:])
        if dim is None
        else (x.movedim(dim, heads))
    )
    return x.flatten(heads, heads + 1)


def _empty(
    op: Any, args: tuple[Tensor | None, ...], in_dims: tuple[int | None, ...]
) -> tuple[Tensor, ...]:
    """The outputs of a mapped dimension of size 0: shapes from the fake implementation."""
    device = next(x.device for x in args if x is not None)
    slices = []
    for x, dim in zip(args, in_dims, strict=True):
        shape = () if x is None else [n for d, n in enumerate(x.shape) if d != dim]
        slices.append(None if x is None else torch.empty(shape, dtype=x.dtype, device="meta"))
    return tuple(
        torch.empty((0, *out.shape), dtype=out.dtype, device=device) for out in op(*slices)
    )


def _unfold(x: Tensor, heads: int, size: int) -> Tensor:
    """[..., size * H, ...] -> [size, ..., H, ...]."""
    return x.unflatten(heads, (size, x.shape[heads] // size)).movedim(heads, 0)


def _slice(x: Tensor | None, dim: int | None, i: int) -> Tensor | None:
    return x if x is None or dim is None else x.select(dim, i)


def _batched(op: Any, in_heads: tuple[int | None, ...], out_heads: tuple[int, ...]) -> Any:
    def rule(
        info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        # defaults may be left out of the call
        args = args + (None,) * (len(in_heads) - len(args))
        in_dims = tuple(in_dims) + (None,) * (len(in_heads) - len(in_dims))
        if size == 0:
            outputs = _empty(op, args, in_dims)
            return outputs, (0,) * len(outputs)
        if any(
            x is not None and dim is not None and heads is None
            for heads, x, dim in zip(in_heads, args, in_dims, strict=True)
        ):
            slices = [
                op(*(_slice(x, dim, i) for x, dim in zip(args, in_dims, strict=True)))
                for i in range(size)
            ]
            outputs = tuple(torch.stack(out) for out in zip(*slices, strict=True))
            return outputs, (0,) * len(outputs)
        folded = [
            x if heads is None else _fold(x, dim, heads, size)
            for heads, x, dim in zip(in_heads, args, in_dims, strict=True)
        ]
        outputs = tuple(
            # the last gradient is empty where there is no initial_state
            _unfold(out, heads, size) if out.dim() > heads else out.expand(size, 0)
            for out, heads in zip(op(*folded), out_heads, strict=True)
        )
        return outputs, (0,) * len(outputs)

    return rule


def _wkv_update_rule(
    info: Any,
    in_dims: tuple[int | None, ...],
    r: Tensor,  # [B, T, H, N], and so on: each with a mapped dimension where in_dims says so
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    *index: Tensor | None,
) -> tuple[Tensor, int]:
    if in_dims[5] is None:
        raise RuntimeError(
            "vmap over rwkv6::wkv_update with a state that is not mapped: all slices would update "
            "the same state in place. Map the state as well, or use rwkv6::wkv"
        )
    if info.batch_size > 1 and state.stride(in_dims[5]) == 0:
        raise RuntimeError(
            "vmap over rwkv6::wkv_update with an expanded state: all slices would update the same "
            "memory. Clone the state first"
        )
    if info.batch_size == 0:
        args = (r, k, v, w, u, state, *index)
        (y,) = _empty(lambda *slices: (torch.ops.rwkv6.wkv_update(*slices),), args, in_dims)
        return y, 0
    # On a copy, so that the state is untouched when a slice is refused.
    new = state.clone()
    args = (r, k, v, w, u, new, *index)
    slices = [
        torch.ops.rwkv6.wkv_update(
            *(_slice(x, dim, i) for x, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    state.copy_(new)
    return torch.stack(slices), 0


_WKV_BACKWARD = tuple(_HEADS.values())
_WKV4_BACKWARD = tuple(_CHANNELS.values())
for _name, _in_heads, _out_heads in (
    ("wkv", _WKV_BACKWARD[2:], (2, 1)),
    ("wkv_backward", _WKV_BACKWARD, (2, 2, 2, 2, 0, 1)),
    ("wkv4", _WKV4_BACKWARD[2:], (2, 2)),
    ("wkv4_backward", _WKV4_BACKWARD, (2, 2, 0, 0, 2)),
):
    _op = getattr(torch.ops.rwkv6, _name)
    torch.library.register_vmap(f"rwkv6::{_name}", _batched(_op, _in_heads, _out_heads))
torch.library.register_vmap("rwkv6::wkv_update", _wkv_update_rule)
