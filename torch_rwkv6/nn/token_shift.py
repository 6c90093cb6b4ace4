"""Token shift: every token also sees the one before it."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_rwkv6.nn.fast_path import is_traced


def token_shift(
    x: Tensor,  # [B, T, D]
    shift: Tensor | None,  # [B, D], the last token of the piece before; None is zeros
    cu_seqlens: Tensor | None = None,  # [M + 1], where packed sequences begin and end; M is B then
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, D]
    """The previous token minus this one, and the last token, for the next piece.

    For T = 0 the last token is the ``shift`` that came in.
    """
    if cu_seqlens is not None:
        return _packed(x, shift, cu_seqlens)
    first = x.new_zeros(x.shape[0], x.shape[2]) if shift is None else shift.to(x.dtype)
    if not is_traced() and x.shape[1] == 1:  # A traced graph must work for any length.
        return first.unsqueeze(1) - x, x[:, 0]
    tokens = torch.cat((first.unsqueeze(1), x), 1)  # [B, T + 1, D]
    return tokens[:, :-1] - x, tokens[:, -1]


def _packed(
    x: Tensor,  # [1, T, D]
    shift: Tensor | None,  # [M, D]
    cu_seqlens: Tensor,  # [M + 1]
) -> tuple[Tensor, Tensor]:  # [1, T, D], [M, D]
    """`token_shift` of each sequence by itself."""
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    sequences, tokens = begin.shape[0], x.shape[1]
    first = x.new_zeros(sequences, x.shape[2]) if shift is None else shift.to(x.dtype)
    rows = torch.cat((x[0], first))  # [T + M, D]
    own = torch.arange(tokens, tokens + sequences, device=x.device)  # the row of each shift
    before = torch.arange(-1, tokens, device=x.device)  # the row before each token; one to spare
    # A sequence without tokens writes to the one to spare, and its last token is its shift.
    before = before.scatter(0, begin.where(begin < end, tokens), own)[:tokens]
    last = (end - 1).where(begin < end, own)
    return (rows[before] - x[0]).unsqueeze(0), rows[last]
