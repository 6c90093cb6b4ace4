"""WKV on torch: the registered operator, where it has a kernel of its own."""

from __future__ import annotations

from torch import Tensor

import torch_rwkv6
from keras_adapter.backends import chunked

has_kernels: bool = torch_rwkv6.has_kernels
_DEVICES_WITH_KERNELS = ("cpu",)


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None,  # [S, H, N, N]
    state_map: Tensor | None,  # [B]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B, H, N, N]
    if has_kernels and r.device.type in _DEVICES_WITH_KERNELS:
        return torch_rwkv6.wkv(r, k, v, w, u, initial_state, state_map=state_map)
    return chunked.wkv(r, k, v, w, u, initial_state, state_map)
