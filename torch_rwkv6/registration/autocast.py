"""Mixed precision: r, k, v go to the autocast dtype; w, u and the state stay float32.

The decay exp(-exp(w)) acts on the state once a token: rounded to 8 bits it would change what a
model remembers. `wkv_backward` needs no rule: it gets what the forward pass saved, already cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_rwkv6.checks import check_wkv, check_wkv_update
from torch_rwkv6.registration.schema import library

DEVICE_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _rule(op: Any, check: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    def kernel(
        r: Tensor,  # [B, T, H, N]
        k: Tensor,  # [B, T, H, N]
        v: Tensor,  # [B, T, H, N]
        w: Tensor,  # [B, T, H, N]
        u: Tensor,  # [H, N]
        state: Tensor | None = None,  # [S, H, N, N]
        state_map: Tensor | None = None,  # [B] or [M]
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> Any:
        low = torch.get_autocast_dtype(device_type)
        with torch.amp.autocast(device_type, enabled=False):
            r, k, v = (_cast(x, low) for x in (r, k, v))
            w, u = _cast(w, torch.float32), _cast(u, torch.float32)
            if check is check_wkv and state is not None:
                state = _cast(state, torch.float32)  # wkv_update must write into the caller's own
            check(r, k, v, w, u, state, state_map, cu_seqlens)
            return op(r, k, v, w, u, state, state_map, cu_seqlens)

    return kernel


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # as PyTorch's own rules: float64 is left alone. What is no tensor is left to the check.
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(dtype)


for _device_type, _key in DEVICE_KEYS.items():
    for _name, _check in (("wkv", check_wkv), ("wkv_update", check_wkv_update)):
        _op = getattr(torch.ops.rwkv6, _name).default
        library.impl(_name, _rule(_op, _check, _device_type), _key)
