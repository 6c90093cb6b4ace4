"""The function through which Vision-RWKV calls its bidirectional CUDA kernel, on every device."""
# ruff: noqa: N802

from __future__ import annotations

import torch
from torch import Tensor

from torch_rwkv6.compat._channels import by_channels, check_sizes

__all__ = ["RUN_CUDA_RWKV6"]


def RUN_CUDA_RWKV6(
    B: int,
    T: int,
    C: int,
    H: int,
    r: Tensor,  # [B, T, C]
    k: Tensor,  # [B, T, C]
    v: Tensor,  # [B, T, C]
    w: Tensor,  # [B, T, C]
    u: Tensor,  # [H, N]
) -> Tensor:  # [B, T, C]
    """The operator over the tokens before and after each one, whose own bonus counts once.

    Args:
        B, T, C, H: batch, tokens, channels and heads.
        r, k, v, w: [B, T, C], where C = H * N for any head size N; w before its two exponentials.
        u: [H, N].

    Returns:
        y, [B, T, C] in r's dtype: that of `torch_rwkv6.wkv`, plus that of the same walked from the
        last token to the first and without u.

    Raises:
        TypeError, ValueError: as `torch_rwkv6.wkv`; also if B, T, C, H are not the tensors' sizes.
    """
    check_sizes(B, T, C, H, r, u)
    y, _ = by_channels(r, k, v, w, u)
    r, k, v, w = (x.flip(1) for x in (r, k, v, w))
    back, _ = by_channels(r, k, v, w, torch.zeros_like(u))
    return (y + back.flip(1)).flatten(2)
