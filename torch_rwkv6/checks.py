"""Argument checks shared by everything in Python that computes without the kernel library.

All but `check_values` and `check_memory` look at shapes, strides, dtypes and devices only, so they
run on fake tensors and disappear from compiled code. The kernel library makes the same checks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_rwkv6._torch_private import concrete
from torch_rwkv6.arguments import tensor
from torch_rwkv6.contract import (
    CHECKPOINT_TOKENS,
    CHECKPOINTS,
    MAX_HEAD_SIZE,
    Argument,
    Dtype,
    Operator,
)

NO_OFFSETS = "cu_seqlens: expected at least one offset (M + 1 of them), got none"


def check(operator: Operator, arguments: Sequence[Any]) -> dict[str, int]:
    """Checks a call by the operator's contract.

    Returns:
        The size of each axis, by its letter.

    Raises:
        TypeError: an argument is no tensor or of a dtype that is not allowed.
        ValueError: a shape, device or stride that does not fit.
    """
    given = operator.named(arguments)
    if operator.forward is not None:
        grads = len(operator.arguments) - len(operator.forward.arguments)
        sizes = check(operator.forward, arguments[grads:])
        if CHECKPOINTS.name in given:
            sizes["P"] = _checkpoints(sizes)
        first, checked = arguments[grads], operator.arguments[:grads]
    else:
        sizes, first, checked = {}, arguments[0], operator.arguments
    lead = (operator.forward or operator).arguments[0]
    for argument in checked:
        x = given[argument.name]
        if x is not None or not argument.optional:
            _check_tensor(argument, x, sizes, lead, first)
    if operator.forward is None and "cu_seqlens" in given:
        _check_sequences(operator, given, sizes)
    if operator.mutated:
        _check_in_place(given["state"])
    if operator.checkpointed_of is not None:
        sizes["P"] = _checkpoints(sizes)
    return sizes


def _checkpoints(sizes: dict[str, int]) -> int:
    """The number of rows for the states that `wkv_checkpointed` keeps.

    Two more than there can be states: torch.compile treats sizes of 0 and 1 apart from all others,
    and would compile again where so few become more.
    """
    return sizes["B"] * (sizes["T"] // CHECKPOINT_TOKENS) + 2


def explain(operator: Operator, arguments: Sequence[Any]) -> None:
    """Raises what `check` raises, in place of the exception that is being handled.

    The operators refuse the same arguments as `check`, but most of them by a RuntimeError, and what
    is no tensor without naming the argument. Checking only after a failure saves more time per call
    than an operator itself takes.
    """
    try:
        check(operator, arguments)
    except (TypeError, ValueError) as error:
        raise error from None


def _check_tensor(
    argument: Argument,
    x: Any,
    sizes: dict[str, int],  # of the axes so far, to which those of x are added
    lead: Argument,
    first: Tensor,  # the operator's first input, the value of `lead`
) -> None:
    name, axes = argument.name, argument.axes
    tensor(name, x)
    if x.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one. Put sequences of different "
            "lengths one behind the other ([1, T, ...], x.values()) and say by cu_seqlens where "
            "each begins (x.offsets())"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
    allowed = argument.dtype.allowed(first)
    if x.dtype not in allowed:
        names = " or ".join(dict.fromkeys(str(d) for d in allowed))
        alone = argument.dtype in (Dtype.FLOAT, Dtype.INDEX)
        beside = "" if alone else f" beside {lead.name} of {first.dtype}"
        raise TypeError(f"{name}: expected {names}{beside}, got {x.dtype}")
    if argument.dtype is Dtype.INDEX:  # its length is checked in _check_sequences
        if x.dim() != 1:
            raise ValueError(f"{name}: expected 1 dimension, got shape {tuple(x.shape)}")
    elif argument is lead:
        if x.dim() != len(axes):
            raise ValueError(
                f"{name}: expected {len(axes)} dimensions {argument.shape_name}{argument.hint}, "
                f"got shape {tuple(x.shape)}"
            )
        sizes.update(zip(axes, x.shape))
        if "H" in sizes and not 1 <= sizes["N"] <= MAX_HEAD_SIZE:
            raise ValueError(
                f"{name}: expected a head size N from 1 to {MAX_HEAD_SIZE}, got {sizes['N']}"
            )
    else:
        expected = [int(a) if a.isdigit() else sizes.get(a, a) for a in axes]
        fits = x.dim() == len(axes) and all(
            size == n for size, n in zip(expected, x.shape) if not isinstance(size, str)
        )
        if not fits:
            raise ValueError(
                f"{name}: expected {_shape_name(argument, lead, expected)}{argument.hint}, "
                f"got shape {tuple(x.shape)}"
            )
        sizes.update((a, n) for a, n in zip(axes, x.shape) if a not in sizes)
    if x.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} like {lead.name}, got {x.device}")


def _shape_name(argument: Argument, lead: Argument, expected: Sequence[int | str]) -> str:
    """What a shape should be: the names of its axes, and their sizes as far as they are known."""
    if argument.axes == lead.axes:
        return f"the shape of {lead.name} = {tuple(expected)}"
    if any(isinstance(size, str) for size in expected):
        return f"{argument.shape_name} = [{', '.join(map(str, expected))}]"
    return f"{argument.shape_name} = {tuple(expected)}"


def _check_sequences(operator: Operator, given: dict[str, Any], sizes: dict[str, int]) -> None:
    """Checks state_map and cu_seqlens against the states; adds M, the number of sequences."""
    state_map, cu_seqlens = given["state_map"], given["cu_seqlens"]
    sequences = sizes["B"]
    if cu_seqlens is not None:
        if sequences != 1:
            raise ValueError(
                "cu_seqlens: packed sequences need B = 1 (all tokens in one row), "
                f"got B = {sequences}"
            )
        offsets = cu_seqlens.shape[0]
        if torch.compiler.is_compiling():  # the number may be known only when compiled code runs
            torch._check(offsets >= 1, lambda: NO_OFFSETS)
        elif offsets < 1:
            raise ValueError(NO_OFFSETS)
        sequences = offsets - 1
    sizes["M"] = sequences
    if "S" not in sizes:
        if state_map is not None:
            raise ValueError("state_map: given without initial_state, which it would index")
        return
    rows = sizes["S"]
    if state_map is not None:
        if state_map.shape[0] != sequences:
            raise ValueError(
                f"state_map: expected one entry per sequence ({sequences}), "
                f"got {state_map.shape[0]}"
            )
    elif operator.mutated:
        if rows != sequences:
            raise ValueError(
                f"state: expected one row per sequence ({sequences}) or a state_map that names the "
                f"rows, got {rows} rows"
            )
    elif rows != sequences and rows != 1:
        raise ValueError(
            f"initial_state: {rows} states for {sequences} sequences need a state_map that "
            f"says which sequence starts from which (without one, pass 1 or {sequences})"
        )


def _check_in_place(state: Tensor) -> None:
    if any(size > 1 and stride == 0 for size, stride in zip(state.shape, state.stride())):
        raise ValueError(
            "state: it is updated in place, but it is an expanded view whose elements share memory "
            f"(shape {tuple(state.shape)}, strides {tuple(state.stride())})"
        )
    if state.shape[-1] > 1 and state.stride(-1) != 1:
        raise ValueError(
            "state: it is updated in place and its last dimension must be contiguous (stride 1), "
            f"got strides {tuple(state.stride())}"
        )


def check_offsets(cu_seqlens: Any, name: str, x: Tensor) -> None:
    """Checks the cu_seqlens of sequences that are packed into the argument x, [B, T, ...].

    Raises:
        TypeError: no tensor of integers.
        ValueError: a shape or device that does not fit, or B is not 1.
    """
    if tensor("cu_seqlens", cu_seqlens).dtype not in (torch.int64, torch.int32):
        raise TypeError(f"cu_seqlens: expected int64 or int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens: expected [M + 1] for M sequences, got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"cu_seqlens: expected the device of {name}, {x.device}, got {cu_seqlens.device}"
        )
    if x.shape[0] != 1:
        raise ValueError(
            f"{name}: packed sequences need B = 1 (all tokens in one row), got B = {x.shape[0]}"
        )


def check_values(
    tokens: int,
    rows: int,
    state_map: Tensor | None,  # [B] or [M]
    cu_seqlens: Tensor | None,  # [M + 1]
    negative_skips: bool = False,
) -> None:
    """Raises RuntimeError for index values out of range, on the CPU, where reading them is cheap.

    Args:
        tokens: T.
        rows: S, the number of states.
        negative_skips: as in `wkv_update`: negative entries of state_map are padding rows, the
            others must be distinct.
    """
    offsets = _values(cu_seqlens) or []
    if len(offsets) == 1 and tokens:
        raise RuntimeError(f"cu_seqlens: no sequence for T = {tokens} tokens")
    if offsets and offsets[0] != 0:
        raise RuntimeError(f"cu_seqlens: the first must be 0, got {offsets[0]}")
    if offsets and offsets[-1] != tokens:
        raise RuntimeError(f"cu_seqlens: the last must be T = {tokens}, got {offsets[-1]}")
    for m, (begin, end) in enumerate(itertools.pairwise(offsets), 1):
        if end < begin:
            raise RuntimeError(f"cu_seqlens: must not fall, but entry {m} is {end} after {begin}")
    taken = set()
    for m, row in enumerate(_values(state_map) or []):
        if negative_skips and row < 0:
            continue
        if not 0 <= row < rows:
            raise RuntimeError(f"state_map: entry {m} is {row}, expected 0 to {rows - 1}")
        if negative_skips and row in taken:
            raise RuntimeError(
                f"state_map: two sequences cannot update row {row} of state in place"
            )
        taken.add(row)


def check_memory(state: Tensor) -> None:
    """Raises ValueError if two elements of the state share memory."""
    if state.numel() <= 1:
        return
    dims = sorted((step, size) for step, size in zip(state.stride(), state.shape) if size > 1)
    span = 1  # of the dimensions so far; if each stride is at least this, nothing overlaps
    nested = True
    for step, size in dims:
        nested = nested and step >= span
        span += step * (size - 1)
    if nested:
        return
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for step, size in dims:
        places = places[..., None] + step * torch.arange(size, device="cpu")
    if places.unique().numel() < state.numel():
        raise ValueError(
            "state: it is updated in place, but its elements overlap in memory "
            f"(shape {tuple(state.shape)}, strides {tuple(state.stride())})"
        )


def _values(x: Tensor | None) -> list[int] | None:
    """The values of a CPU tensor; None if there is no tensor or it is traced and has no values."""
    x = None if x is None else concrete(x)
    if type(x) is not Tensor or x.device.type != "cpu":
        return None
    return x.tolist()
