"""Batches with padding, as packed sequences without any."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_rwkv6.nn.fast_path import is_traced

__all__ = ["Packing", "packing_of", "refuse_packed"]


class Packing:
    """The B rows of a batch, and after them all of its padding, as B + 1 sequences in one row.

    What the model computes of a sequence is then what it computes without padding, be it on the
    left, on the right or between tokens. No shape depends on the mask, so this can be compiled.

    Args:
        mask: whether a token is one, [B, T].

    Attributes:
        cu_seqlens: where the sequences begin and end, [B + 2].
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        lengths = torch.cat((mask.sum(1), (~mask).sum()[None]))
        self.cu_seqlens = pad(lengths.cumsum(0), (1, 0))
        self._order = torch.argsort(~mask.flatten(), stable=True)  # [B * T]
        # A padded place shows what the last token before it gave; none before the first token.
        self._before_first = (mask.cumsum(1) == 0).unsqueeze(2)  # [B, T, 1]
        self._last = (mask.flatten().cumsum(0) - 1).clamp(min=0)  # [B * T]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, D] as [1, B * T, D]."""
        return x.flatten(0, 1)[self._order].unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, B * T, D] as [B, T, D]."""
        return x[0, self._last].unflatten(0, self.shape).masked_fill(self._before_first, 0)

    def pack_state(self, state: Tensor | None) -> Tensor | None:
        """[B, ...] as [B + 1, ...]."""
        return None if state is None else torch.cat((state, torch.zeros_like(state[:1])))

    def unpack_state(self, state: Tensor) -> Tensor:
        """[B + 1, ...] as [B, ...]."""
        return state[:-1]


def packing_of(
    attention_mask: Tensor | None,  # [B, S], S >= T
    x: Tensor,  # [B, T, D]
) -> Packing | None:
    """How to pack the batch; None where no token is padding.

    Raises:
        ValueError: a mask of another shape.
    """
    if attention_mask is None:
        return None
    batch, tokens = x.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected [B, S] with B = {batch}, got {shape}")
    if attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask: expected a column for each of {tokens} tokens, got "
            f"{attention_mask.shape[1]}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - tokens :].to(x.device) != 0
    return None if not is_traced() and bool(mask.all()) else Packing(mask)


def refuse_packed(position_ids: Tensor | None) -> None:
    """Refuses rows of several texts, which trainers mark by positions that begin anew.

    Raises:
        ValueError: a row with more than one position 0.
    """
    if position_ids is None or is_traced():
        return
    if bool(((position_ids == 0).sum(-1) > 1).any()):
        raise ValueError(
            "position_ids: expected one text in each row, got several (packing, padding_free), "
            "which would be read as one: pad them instead"
        )
