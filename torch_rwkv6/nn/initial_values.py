"""What the official initial values depend on, in every version: the layer and the channel."""

from __future__ import annotations

import torch
from torch import Tensor


def position(layer_id: int, n_layer: int) -> tuple[float, float]:
    """depth, from 0 for the first layer to 1 for the last; height, from 1 to almost 0.

    Depth is 0 where there is only one layer (the official formula would divide by zero).

    Raises:
        ValueError: layer_id is not below n_layer.
    """
    if not 0 <= layer_id < n_layer:
        raise ValueError(f"layer_id: expected 0 to n_layer - 1 = {n_layer - 1}, got {layer_id}")
    return layer_id / max(n_layer - 1, 1), 1 - layer_id / n_layer


def channels(n_embd: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:  # [D] each
    """n / D and n / (D - 1) of the channels n = 0 to D - 1, and the zigzag (n + 1) % 3 - 1."""
    n = torch.arange(n_embd, device=device)
    return n / n_embd, n / max(n_embd - 1, 1), (n + 1) % 3 - 1
