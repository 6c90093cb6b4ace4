"""The states of a layer in transformers' cache for linear attention.

That layer of a cache has a convolution's last inputs and a recurrent state. Token shift is a
convolution over two tokens, so its last input is kept there: of time mixing and channel mixing one
after the other, [B, 2 D, 1]. The recurrent state is WKV6's, [B, H, N, N].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

__all__ = ["read_states", "write_states"]

States = tuple[Tensor, Tensor, Tensor]  # att_shift [B, D], wkv [B, H, N, N], ffn_shift [B, D]


def read_states(cache: Cache | None, layer: int) -> States | tuple[None, None, None]:
    """att_shift, wkv and ffn_shift of a layer; None where no token has been seen.

    Without gradients, wkv is the memory of the cache; the others are copies.

    Raises:
        TypeError: a cache of other models.
    """
    if cache is None:
        return None, None, None
    kept = cache.layers[layer] if layer < len(cache.layers) else cache
    if not hasattr(kept, "recurrent_states"):
        raise TypeError(
            "past_key_values: expected a cache for linear attention, DynamicCache(config=...), got "
            f"{type(cache).__name__} with {type(kept).__name__}"
        )
    if not cache.has_previous_state(layer):
        return None, None, None
    att_shift, ffn_shift = _only(kept.conv_states).squeeze(2).chunk(2, 1)
    wkv = _only(kept.recurrent_states)
    # With gradients it is needed as it was, after the cache has gone on.
    return att_shift.clone(), wkv.clone() if torch.is_grad_enabled() else wkv, ffn_shift.clone()


def write_states(
    cache: Cache,
    layer: int,
    att_shift: Tensor,  # [B, D]
    wkv: Tensor,  # [B, H, N, N]
    ffn_shift: Tensor,  # [B, D]
) -> None:
    """Keeps the states of a layer: the memory of the cache stays where it is."""
    cache.update_conv_state(torch.cat((att_shift, ffn_shift), 1).unsqueeze(2), layer)
    cache.layers[layer].dtype = wkv.dtype  # in which transformers 5.6 keeps it; it is not rounded
    cache.update_recurrent_state(wkv, layer)


def _only(states: Any) -> Tensor:
    """The one state of a kind, which newer versions of transformers keep in a dictionary."""
    return states[0] if isinstance(states, dict) else states
