"""Fake (meta) implementations: shapes, dtypes and devices without computing."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_rwkv6.checks import (
    check_matvec,
    check_wkv,
    check_wkv4,
    check_wkv4_backward,
    check_wkv4_update,
    check_wkv_backward,
    check_wkv_update,
    state_dtype,
)


@torch.library.register_fake("rwkv6::wkv")
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
    sequences = check_wkv(r, k, v, w, u, initial_state, state_map, cu_seqlens)
    _, _, heads, size = r.shape
    final_state = r.new_empty((sequences, heads, size, size), dtype=state_dtype(r))
    return r.new_empty(r.shape), final_state


@torch.library.register_fake("rwkv6::wkv_backward")
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
    check_wkv_backward(
        grad_y, grad_final_state, r, k, v, w, u, initial_state, state_map, cu_seqlens
    )
    gr, gk, gv, gw, gu = (x.new_empty(x.shape) for x in (r, k, v, w, u))
    if initial_state is None:
        return gr, gk, gv, gw, gu, r.new_empty((0,), dtype=torch.float32)
    return gr, gk, gv, gw, gu, initial_state.new_empty(initial_state.shape)


@torch.library.register_fake("rwkv6::wkv_update")
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
    return r.new_empty(r.shape)


@torch.library.register_fake("rwkv6::wkv4")
def wkv4(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None = None,  # [B, 3, D]
) -> tuple[Tensor, Tensor]:  # y [B, T, D], final_state [B, 3, D]
    check_wkv4(k, v, w, u, initial_state)
    batch, _, width = k.shape
    return k.new_empty(k.shape), k.new_empty((batch, 3, width), dtype=state_dtype(k))


@torch.library.register_fake("rwkv6::wkv4_backward")
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
    gk, gv, gw, gu = (x.new_empty(x.shape) for x in (k, v, w, u))
    if initial_state is None:
        return gk, gv, gw, gu, k.new_empty((0,), dtype=torch.float32)
    return gk, gv, gw, gu, initial_state.new_empty(initial_state.shape)


@torch.library.register_fake("rwkv6::wkv4_update")
def wkv4_update(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    state: Tensor,  # [B, 3, D]
) -> Tensor:  # [B, T, D]
    check_wkv4_update(k, v, w, u, state)
    return k.new_empty(k.shape)


@torch.library.register_fake("rwkv6::matvec")
def matvec(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
) -> Tensor:  # [M, N]
    check_matvec(x, weight)
    return x.new_empty((x.shape[0], weight.shape[0]))
