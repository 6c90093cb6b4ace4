"""The function that the remote code of RWKV-6 models on the Hugging Face hub computes with."""

from __future__ import annotations

from torch import Tensor

from torch_rwkv6.compat._channels import by_channels

__all__ = ["rwkv6_linear_attention"]


def rwkv6_linear_attention(
    training: bool,
    receptance: Tensor,  # [B, T, C]
    key: Tensor,  # [B, T, C]
    value: Tensor,  # [B, T, C]
    time_decay: Tensor,  # [B, T, C]
    time_first: Tensor,  # [H, N]
    state: Tensor | None,  # [B, H, N, N]
) -> tuple[Tensor, Tensor | None]:  # [B, T, H, N], [B, H, N, N]
    """`torch_rwkv6.wkv` in the place of the function of this name in ``modeling_rwkv6.py``.

    Args:
        training: has no effect.
        receptance, key, value, time_decay: r, k, v, w of `torch_rwkv6.wkv` as [B, T, C].
        time_first: u, [H, N].
        state: initial state, [B, H, N, N] as [key, value]; None is zeros.

    Returns:
        y, [B, T, H, N], and the final state; None where there was no initial state, as the models
        store it if it is there.

    Raises:
        TypeError, ValueError: as `torch_rwkv6.wkv`, under the names that it has for the arguments.
    """
    # the models overwrite the memory of their state, which backward still needs
    start = None if state is None else state.clone()
    y, final_state = by_channels(receptance, key, value, time_decay, time_first, start)
    return y, None if state is None else final_state
