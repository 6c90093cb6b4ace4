"""Argument checks shared by everything in Python that computes without the kernel library.

All but `check_values` and `check_memory` look at shapes, strides, dtypes and devices only: so they
run on fake tensors and disappear from compiled code. The kernel library has the same ones for
whoever calls it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from torch_rwkv6._torch_private import concrete

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_HEAD_SIZE = 256


def check_wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None,  # [S, H, N, N]
    state_map: Tensor | None,  # [B] or [M]
    cu_seqlens: Tensor | None,  # [M + 1]
) -> int:
    """Raises TypeError or ValueError; returns the number of sequences, B or M."""
    sequences = _check_inputs(r, k, v, w, u, cu_seqlens)
    if initial_state is not None:
        allowed = (state_dtype(r), r.dtype)
        _check_state("initial_state", initial_state, r, allowed, state_map, sequences)
        rows = initial_state.shape[0]
        if state_map is None and rows != sequences and rows != 1:
            raise ValueError(
                f"initial_state: {rows} states for {sequences} sequences need a state_map that "
                f"says which sequence starts from which (without one, pass 1 or {sequences})"
            )
    elif state_map is not None:
        raise ValueError("state_map: given without initial_state, which it would index")
    return sequences


def check_wkv_update(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [S, H, N, N]
    state_map: Tensor | None,  # [B] or [M]
    cu_seqlens: Tensor | None,  # [M + 1]
) -> None:
    """Raises TypeError or ValueError."""
    sequences = _check_inputs(r, k, v, w, u, cu_seqlens)
    _check_state("state", state, r, (state_dtype(r),), state_map, sequences)
    if state_map is None and state.shape[0] != sequences:
        raise ValueError(
            f"state: expected one row per sequence ({sequences}) or a state_map that names the "
            f"rows, got {state.shape[0]} rows"
        )
    _check_in_place(state)


def check_wkv_backward(
    grad_y: Tensor | None,  # [B, T, H, N]
    grad_final_state: Tensor | None,  # [B or M, H, N, N]
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None,  # [S, H, N, N]
    state_map: Tensor | None,  # [B] or [M]
    cu_seqlens: Tensor | None,  # [M + 1]
) -> None:
    """Raises TypeError or ValueError."""
    sequences = check_wkv(r, k, v, w, u, initial_state, state_map, cu_seqlens)
    if grad_y is not None:
        _check_tensor("grad_y", grad_y, r.shape, "the shape of r", (r.dtype,), r)
    if grad_final_state is not None:
        shape = (sequences, r.shape[2], r.shape[3], r.shape[3])
        names = "[sequences, H, N, N]"
        _check_tensor("grad_final_state", grad_final_state, shape, names, (state_dtype(r),), r)


def check_wkv4(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None = None,  # [B, 3, D]
) -> None:
    """Raises TypeError or ValueError."""
    _check_channels(k, v, w, u)
    if initial_state is not None:
        _check_channel_state("initial_state", initial_state, k)


def check_wkv4_update(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    state: Tensor,  # [B, 3, D]
) -> None:
    """Raises TypeError or ValueError."""
    _check_channels(k, v, w, u)
    _check_channel_state("state", state, k)
    _check_in_place(state)


def check_wkv4_backward(
    grad_y: Tensor | None,  # [B, T, D]
    grad_final_state: Tensor | None,  # [B, 3, D]
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None = None,  # [B, 3, D]
) -> None:
    """Raises TypeError or ValueError."""
    check_wkv4(k, v, w, u, initial_state)
    if grad_y is not None:
        _check_tensor("grad_y", grad_y, k.shape, "the shape of k", (k.dtype,), k, "k")
    if grad_final_state is not None:
        _check_channel_state("grad_final_state", grad_final_state, k)


def check_matvec(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
) -> None:
    """Raises TypeError or ValueError."""
    _check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected 2 dimensions [M, K], got shape {tuple(x.shape)}")
    shape = (weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else -1, x.shape[1])
    _check_tensor("weight", weight, shape, "[N, K]", (x.dtype,), x, "x")


def check_values(
    tokens: int,
    rows: int,
    state_map: Tensor | None,  # [B] or [M]
    cu_seqlens: Tensor | None,  # [M + 1]
    negative_skips: bool = False,
) -> None:
    """Raises RuntimeError for index values out of range, where a look at them is cheap: on the CPU.

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
    """Raises ValueError for a state two elements of which share memory, whatever its strides."""
    if state.numel() <= 1:
        return
    dims = sorted((step, size) for step, size in zip(state.stride(), state.shape) if size > 1)
    span = 1  # of the dimensions so far; where each steps over the smaller ones nothing overlaps
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
    """The values of a CPU tensor; None where there is none, or only one that a tracer follows."""
    x = None if x is None else concrete(x)
    if type(x) is not Tensor or x.device.type != "cpu":
        return None
    return x.tolist()


def state_dtype(r: Tensor) -> torch.dtype:
    """The dtype of the state that belongs to inputs of r's dtype."""
    return torch.float64 if r.dtype == torch.float64 else torch.float32


def _check_dense(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one. Put sequences of different "
            "lengths one behind the other ([1, T, ...], x.values()) and say by cu_seqlens where "
            "each begins (x.offsets())"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")


def _check_float(name: str, x: Tensor) -> None:
    _check_dense(name, x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected {_names(FLOAT_DTYPES)}, got {x.dtype}")


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


def _check_inputs(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, cu_seqlens: Tensor | None
) -> int:
    _check_float("r", r)
    if r.dim() != 4:
        raise ValueError(
            f"r: expected 4 dimensions [B, T, H, N] (view [B, T, C] as [B, T, C // N, N] first), "
            f"got shape {tuple(r.shape)}"
        )
    heads, size = r.shape[2], r.shape[3]
    if not 1 <= size <= MAX_HEAD_SIZE:
        raise ValueError(f"r: expected a head size N from 1 to {MAX_HEAD_SIZE}, got {size}")
    own_or_f32 = (r.dtype, torch.float32)
    _check_tensor("k", k, r.shape, "the shape of r", (r.dtype,), r)
    _check_tensor("v", v, r.shape, "the shape of r", (r.dtype,), r)
    _check_tensor("w", w, r.shape, "the shape of r", own_or_f32, r)
    _check_tensor("u", u, (heads, size), "[H, N]", own_or_f32, r)
    if cu_seqlens is None:
        return r.shape[0]
    _check_index("cu_seqlens", cu_seqlens, r)
    if r.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: packed sequences need B = 1 (all tokens in one row), got B = {r.shape[0]}"
        )
    offsets = cu_seqlens.shape[0]
    # not an if: the number may be known only when compiled code runs
    torch._check_value(
        offsets >= 1, lambda: "cu_seqlens: expected at least one offset (M + 1 of them), got none"
    )
    return offsets - 1


def _check_state(
    name: str,
    state: Tensor,
    r: Tensor,
    dtypes: tuple[torch.dtype, ...],
    state_map: Tensor | None,
    sequences: int,
) -> None:
    _check_dense(name, state)
    heads, size = r.shape[2], r.shape[3]
    if state.dim() != 4 or tuple(state.shape[1:]) != (heads, size, size):
        raise ValueError(
            f"{name}: expected [S, H, N, N] = [S, {heads}, {size}, {size}] ([key, value]), "
            f"got {tuple(state.shape)}"
        )
    _check_tensor(name, state, state.shape, "", dtypes, r)
    if state_map is not None:
        _check_index("state_map", state_map, r)
        if state_map.shape[0] != sequences:
            raise ValueError(
                f"state_map: expected one entry per sequence ({sequences}), "
                f"got {state_map.shape[0]}"
            )


def _check_channels(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> None:
    _check_float("k", k)
    if k.dim() != 3:
        raise ValueError(f"k: expected 3 dimensions [B, T, D], got shape {tuple(k.shape)}")
    own_or_f32 = (k.dtype, torch.float32)
    _check_tensor("v", v, k.shape, "the shape of k", (k.dtype,), k, "k")
    _check_tensor("w", w, (k.shape[2],), "[D]", own_or_f32, k, "k")
    _check_tensor("u", u, (k.shape[2],), "[D]", own_or_f32, k, "k")


def _check_channel_state(name: str, state: Tensor, k: Tensor) -> None:
    shape = (k.shape[0], 3, k.shape[2])
    _check_tensor(name, state, shape, "[B, 3, D]", (state_dtype(k),), k, "k")


def _check_tensor(
    name: str,
    x: Tensor,
    shape: torch.Size | tuple[int, ...],
    shape_name: str,
    dtypes: tuple[torch.dtype, ...],
    r: Tensor,
    r_name: str = "r",
) -> None:
    _check_dense(name, x)
    if x.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected {_names(dtypes)} beside {r_name} of {r.dtype}, got {x.dtype}"
        )
    if x.shape != shape:
        raise ValueError(
            f"{name}: expected {shape_name} = {tuple(shape)}, got shape {tuple(x.shape)}"
        )
    if x.device != r.device:
        raise ValueError(f"{name}: expected device {r.device} like {r_name}, got {x.device}")


def _check_index(name: str, x: Tensor, r: Tensor) -> None:
    _check_dense(name, x)
    if x.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: expected {_names(INDEX_DTYPES)}, got {x.dtype}")
    if x.dim() != 1:
        raise ValueError(f"{name}: expected 1 dimension, got shape {tuple(x.shape)}")
    if x.device != r.device:
        raise ValueError(f"{name}: expected device {r.device} like r, got {x.device}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(dict.fromkeys(str(d) for d in dtypes))
