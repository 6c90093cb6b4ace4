"""The reference as the kernel of every device that has none of its own.

Registered for all backends: the binary's kernels take precedence where they are loaded.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

import torch_rwkv6
from torch_rwkv6 import _library, reference, reference4
from torch_rwkv6.checks import (
    check_matvec,
    check_memory,
    check_values,
    check_wkv,
    check_wkv4,
    check_wkv4_backward,
    check_wkv4_update,
    check_wkv_backward,
    check_wkv_update,
)
from torch_rwkv6.registration.schema import library


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B or M, H, N, N]
    check_wkv(r, k, v, w, u, initial_state, state_map, cu_seqlens)
    rows = 1 if initial_state is None else initial_state.shape[0]
    check_values(r.shape[1], rows, state_map, cu_seqlens)
    return reference.wkv(r, k, v, w, u, initial_state, state_map, cu_seqlens)


def wkv_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (r, k, v, w, u, initial_state, state_map, cu_seqlens)
    check_wkv_backward(grad_y, grad_final_state, *inputs)
    rows = 1 if initial_state is None else initial_state.shape[0]
    check_values(r.shape[1], rows, state_map, cu_seqlens)
    return reference.wkv_backward(grad_y, grad_final_state, *inputs)


def wkv_update(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> Tensor:  # [B, T, H, N]
    check_wkv_update(r, k, v, w, u, state, state_map, cu_seqlens)
    check_values(r.shape[1], state.shape[0], state_map, cu_seqlens, negative_skips=True)
    check_memory(state)
    if state_map is None:
        y, final_state = reference.wkv(r, k, v, w, u, state, None, cu_seqlens)
        state.copy_(final_state)
        return y
    skipped = state_map < 0
    y, final_state = reference.wkv(r, k, v, w, u, state, state_map.clamp(min=0), cu_seqlens)
    # where values were not looked at: a row that does not exist gave NaN and is written nowhere
    written = ~skipped & (state_map < state.shape[0])
    state[state_map[written]] = final_state[written]
    if cu_seqlens is None:
        return y.masked_fill(skipped[:, None, None, None], 0)
    padding = skipped.repeat_interleave(cu_seqlens.diff())  # [T]
    return y.masked_fill(padding[None, :, None, None], 0)


def wkv4(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None = None,  # [B, 3, D]
) -> tuple[Tensor, Tensor]:  # y [B, T, D], final_state [B, 3, D]
    check_wkv4(k, v, w, u, initial_state)
    return reference4.wkv4(k, v, w, u, initial_state)


def wkv4_backward(
    grad_y: Tensor | None,  # [B, T, D]
    grad_final_state: Tensor | None,  # [B, 3, D]
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None,  # [B, 3, D]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_wkv4_backward(grad_y, grad_final_state, k, v, w, u, initial_state)
    return reference4.wkv4_backward(grad_y, grad_final_state, k, v, w, u, initial_state)


def wkv4_update(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    state: Tensor,  # [B, 3, D]
) -> Tensor:  # [B, T, D]
    check_wkv4_update(k, v, w, u, state)
    check_memory(state)
    y, final_state = reference4.wkv4(k, v, w, u, state)
    state.copy_(final_state)
    return y


def matvec(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
) -> Tensor:  # [M, N]
    check_matvec(x, weight)
    return x @ weight.T


def slow_on_gpus(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which says once that kernels would be faster."""

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        _say_what_is_missing()
        return function(*args)

    return kernel


@functools.cache
def _say_what_is_missing() -> None:
    problem = _library.cuda_problem() if torch_rwkv6.has_kernels else None
    warnings.warn(
        "torch_rwkv6: there are no CUDA kernels, so WKV6 runs its pure PyTorch reference on the "
        f"GPU: the same results, but much slower.{f' Reason: {problem}.' if problem else ''} "
        "To build them for an NVIDIA GPU, "
        "install again where nvcc is found, with RWKV6_CUDA=1: pip install --force-reinstall "
        "--no-deps --no-binary torch_rwkv6 torch_rwkv6, or `pip install .` in a checkout.",
        RuntimeWarning,
        stacklevel=3,
    )


for _function in (wkv, wkv_backward, wkv_update, wkv4, wkv4_backward, wkv4_update, matvec):
    library.impl(_function.__name__, _function, "CompositeExplicitAutograd")
if not torch_rwkv6.has_cuda_kernels:
    for _function in (wkv, wkv_backward, wkv_update):
        library.impl(_function.__name__, slow_on_gpus(_function), "CUDA")
