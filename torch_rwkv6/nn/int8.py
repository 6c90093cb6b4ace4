"""Weight-only int8: the matrices of a model in a quarter of the memory of float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Int8Linear", "quantize_int8_"]


class Int8Linear(nn.Module):
    """``y = x W^T`` with row n of W stored as ``scale[n] * weight[n]``, 8 bits a number.

    Scales are symmetric, one for each row of W: ``scale[n] = max |W[n]| / 127``. Every number of W
    is then off by at most half a scale. Sums are computed in float32, from the activations as they
    are: these are not quantised.

    For inference: weight and scale are buffers, and gradients reach x alone.

    Attributes:
        weight: [N, K], int8.
        scale: [N], float32, in whatever dtype the module is asked to be.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        weight: Tensor,  # [N, K], int8
        scale: Tensor,  # [N]
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        weight: Tensor,  # [N, K]
    ) -> Int8Linear:
        """The nearest one to a weight of floating-point numbers.

        Raises:
            ValueError: the weight is not finite.
        """
        exact = weight.detach().float()
        largest = exact.abs().amax(1) if exact.shape[1] else exact.new_zeros(len(exact))
        if not weight.is_meta and not bool(largest.isfinite().all()):
            raise ValueError("weight: expected finite numbers to quantise, got NaN or infinity")
        scale = largest / 127
        steps = torch.where(scale > 0, scale, 1.0)
        return cls((exact / steps[:, None]).round_().to(torch.int8), scale)

    def dequantized(self, dtype: torch.dtype) -> Tensor:  # [N, K]
        """W in this dtype."""
        return (self.weight.to(self.scale.dtype) * self.scale[:, None]).to(dtype)

    def forward(
        self,
        x: Tensor,  # [..., K]
    ) -> Tensor:  # [..., N]
        """``x W^T`` in the dtype of x; for many tokens at once, with W in that of the sums."""
        dtype = torch.promote_types(x.dtype, torch.float32) if x.is_cpu else x.dtype
        return nn.functional.linear(x.to(dtype), self.dequantized(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias=False"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the model, but stays float32 where the model is cast to another dtype."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self


def quantize_int8_(model: nn.Module) -> nn.Module:
    """Replaces every matrix of the model by an `Int8Linear`: for decoding on a CPU.

    Decoding takes the time that reading the weights takes, and these are most of them. The
    embedding, of which one row a token is read, the low-rank weights and the vectors stay as they
    are.

    Args:
        model: of any version, on any device (on the meta device, to load a state_dict into); it is
            changed in place. LoRA and other adapters are merged first.

    Returns:
        The model.

    Raises:
        ValueError: it has no nn.Linear without bias, or a weight that is not finite.
    """
    found = False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.bias is None:
                setattr(parent, name, Int8Linear.of(child.weight).train(child.training))
                found = True
    if not found:
        raise ValueError("model: expected matrices (nn.Linear without bias), found none")
    return model
