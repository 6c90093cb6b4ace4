"""Batches with padding, and rows of several texts, as packed sequences without either."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from torch_rwkv6.nn.fast_path import is_traced

__all__ = ["Packing", "packing_of"]


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


class Texts(Packing):
    """Rows of several texts, M in all, as M sequences in one row: nothing of one reaches another.

    Args:
        position_ids: 0 for the first token of a text, [B, T].

    Attributes:
        cu_seqlens: where the texts begin and end, [M + 1].
    """

    def __init__(self, position_ids: Tensor) -> None:
        self.shape = position_ids.shape
        first = position_ids == 0
        first[:, 0] = True
        begin = first.flatten().nonzero()[:, 0]  # [M]
        self.cu_seqlens = pad(begin, (0, 1), value=first.numel())
        self._last_text = first.sum(1).cumsum(0) - 1  # of each row, [B]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, D] as [1, B * T, D]."""
        return x.flatten(0, 1).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """[1, B * T, D] as [B, T, D]."""
        return x[0].unflatten(0, self.shape)

    def pack_state(self, state: Tensor | None) -> None:
        """Refuses a state: texts start without one."""
        if state is not None:
            raise ValueError("position_ids: expected one text in each row beside past_key_values")

    def unpack_state(self, state: Tensor) -> Tensor:
        """[M, ...] as [B, ...]: that of the last text in each row."""
        return state[self._last_text]


def packing_of(
    attention_mask: Tensor | None,  # [B, S], S >= T
    position_ids: Tensor | None,  # [B, T] or [1, T]
    x: Tensor,  # [B, T, D]
) -> Packing | None:
    """How to pack the batch; None where every row is one text without padding.

    Raises:
        ValueError: a mask or positions of another shape; several texts in a row with padding.
    """
    if position_ids is not None:
        return _packing_by_positions(attention_mask, position_ids, x)
    mask = _mask(attention_mask, x)
    return None if mask is None else Packing(mask)


@torch.compiler.disable(reason="position_ids: their values say where texts begin")
def _packing_by_positions(
    attention_mask: Tensor | None,  # [B, S], S >= T
    position_ids: Tensor,  # [B, T] or [1, T]
    x: Tensor,  # [B, T, D]
) -> Packing | None:
    """`packing_of` where positions are given. A graph that is being compiled breaks here."""
    mask = _mask(attention_mask, x)
    batch, tokens = x.shape[:2]
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        shape = tuple(position_ids.shape)
        raise ValueError(f"position_ids: expected [B, T] with T = {tokens}, got {shape}")
    positions = position_ids.to(x.device).expand(batch, tokens)
    begins = positions == 0
    if mask is not None:
        begins = begins & mask  # padding has positions too, which say nothing
    if not bool((begins.sum(1) > 1).any()):
        return None if mask is None else Packing(mask)
    if mask is not None:
        raise ValueError("position_ids: expected one text in each row that has padding")
    return Texts(positions)


def _mask(
    attention_mask: Tensor | None,  # [B, S], S >= T
    x: Tensor,  # [B, T, D]
) -> Tensor | None:  # [B, T]
    """Whether a token is one; None where all are."""
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
    return None if not is_traced() and bool(mask.all()) else mask
