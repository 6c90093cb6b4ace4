"""A linear layer that reads its weight at the memory's speed when it decodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Linear"]

MOST_ROWS = 8  # with more tokens at once a matrix product is faster


class Linear(nn.Linear):
    """``nn.Linear`` without bias, whose inference on a few tokens runs a kernel of ours on CPUs."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        weight = self.weight
        if (
            torch.is_grad_enabled()
            or x.device.type != "cpu"
            or x.numel() > MOST_ROWS * x.shape[-1]
            or x.dtype != weight.dtype
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
        ):
            return super().forward(x)
        rows = torch.ops.rwkv6.matvec.default(x.reshape(-1, x.shape[-1]), weight)
        return rows.view(*x.shape[:-1], weight.shape[0])
