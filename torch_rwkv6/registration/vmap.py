"""Batching rules for torch.vmap: the mapped dimension is folded into the heads.

Heads (in RWKV-4 channels) are independent, and every float tensor has an axis for them, so one
rule serves any mixture of mapped and shared tensors. Only if state_map or cu_seqlens is mapped,
which all heads share, does the operator run once per slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_rwkv6.contract import OPERATORS, Argument, Operator


def _fold(x: Tensor | None, dim: int | None, heads: int, size: int) -> Tensor | None:
    """[..., H, ...] mapped along dim -> [..., size * H, ...]."""
    if x is None:
        return None
    x = (
        x.unsqueeze(heads).expand(*x.shape[:heads], size, *x.shape[heads:])
        if dim is None
        else x.movedim(dim, heads)
    )
    return x.flatten(heads, heads + 1)


def _empty(
    op: Any, args: tuple[Tensor | None, ...], in_dims: tuple[int | None, ...]
) -> tuple[Tensor, ...]:
    """The outputs for a mapped dimension of size 0; the fake implementation gives their shapes."""
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


def _heads(operator: Operator, tensors: tuple[Argument, ...]) -> tuple[Any, ...]:
    """Where the heads are in each tensor; None for the index tensors, which have none."""
    axis = operator.independent
    return tuple(t.axes.index(axis) if axis in t.axes else None for t in tensors)


def _batched(operator: Operator) -> Any:
    def op(*args: Tensor | None) -> tuple[Tensor, ...]:
        found = operator.overload(*args)
        return found if len(operator.results) > 1 else (found,)

    def results(outputs: tuple[Tensor, ...]) -> tuple[Any, Any]:
        return (outputs, (0,) * len(outputs)) if len(outputs) > 1 else (outputs[0], 0)

    in_heads = _heads(operator, operator.arguments)
    out_heads = _heads(operator, operator.results)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Tensor | None) -> tuple[Any, Any]:
        size = info.batch_size
        args, in_dims = operator.complete(args), operator.complete(in_dims)
        if size == 0:
            return results(_empty(op, args, in_dims))
        if any(
            x is not None and dim is not None and heads is None
            for heads, x, dim in zip(in_heads, args, in_dims, strict=True)
        ):
            slices = [
                op(*(_slice(x, dim, i) for x, dim in zip(args, in_dims, strict=True)))
                for i in range(size)
            ]
            return results(tuple(torch.stack(out) for out in zip(*slices, strict=True)))
        folded = [
            x if heads is None else _fold(x, dim, heads, size)
            for heads, x, dim in zip(in_heads, args, in_dims, strict=True)
        ]
        outputs = (
            # the gradient of an optional input that is not given is empty
            _unfold(out, heads, size) if out.dim() > heads else out.expand(size, 0)
            for out, heads in zip(op(*folded), out_heads, strict=True)
        )
        return results(tuple(outputs))

    return rule


def _batched_update(operator: Operator, forward: Operator) -> Any:
    op, (state_index,) = operator.overload, operator.mutated

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        state, dim = args[state_index], in_dims[state_index]
        if dim is None:
            raise RuntimeError(
                f"vmap over rwkv6::{operator.name} with a state that is not mapped: all slices "
                "would update the same state in place. Map the state as well, or use "
                f"rwkv6::{forward.name}"
            )
        if info.batch_size > 1 and state.stride(dim) == 0:
            raise RuntimeError(
                f"vmap over rwkv6::{operator.name} with an expanded state: all slices would update "
                "the same memory. Clone the state first"
            )
        if info.batch_size == 0:
            (y,) = _empty(lambda *slices: (op(*slices),), args, in_dims)
            return y, 0
        # Works on a copy, so that the state is unchanged if a slice raises.
        new = state.clone()
        args = (*args[:state_index], new, *args[state_index + 1 :])
        slices = [
            op(*(_slice(x, dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        state.copy_(new)
        return torch.stack(slices), 0

    return rule


for _operator in OPERATORS:
    if _operator.independent:
        _rule = (
            _batched(_operator)
            if _operator.update_of is None
            else _batched_update(_operator, _operator.update_of)
        )
        torch.library.register_vmap(f"rwkv6::{_operator.name}", _rule)
