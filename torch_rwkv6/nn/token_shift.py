"""Token shift: every token also sees the one before it."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_rwkv6.nn.fast_path import is_traced


def token_shift(
    x: Tensor,  # [B, T, D]
    shift: Tensor | None,  # [B, D], the last token of the piece before; None is zeros
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, D]
    """The previous token minus this one, and the last token, for the next piece.

    For T = 0 the last token is the ``shift`` that came in.
    """
    first = x.new_zeros(x.shape[0], x.shape[2]) if shift is None else shift.to(x.dtype)
    if not is_traced() and x.shape[1] == 1:  # A traced graph must work for any length.
        return first.unsqueeze(1) - x, x[:, 0]
    tokens = torch.cat((first.unsqueeze(1), x), 1)  # [B, T + 1, D]
    return tokens[:, :-1] - x, tokens[:, -1]
