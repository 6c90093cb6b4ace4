"""WKV on torch: the registered operator, which has kernels or computes by chunks itself."""

from __future__ import annotations

from torch import Tensor

import torch_rwkv6

has_kernels: bool = torch_rwkv6.has_kernels


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None,  # [S, H, N, N]
    state_map: Tensor | None,  # [B]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B, H, N, N]
    return torch_rwkv6.wkv(r, k, v, w, u, initial_state, state_map=state_map)
