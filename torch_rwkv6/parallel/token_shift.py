"""The token shift over a sequence of which every process has a piece."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_rwkv6.arguments import needs_grad, tensor
from torch_rwkv6.checks import check_offsets
from torch_rwkv6.nn.token_shift import token_shift as of_a_piece
from torch_rwkv6.parallel.ranks import Ranks, check_flags, check_local, flags


def token_shift(
    x: Tensor,  # [B, T, D], this rank's piece
    shift: Tensor | None,  # [B or M, D], the last token before all pieces; None is zeros
    group: dist.ProcessGroup | None,
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B or M, D]
    """The previous token minus this one, where the first token's is the last one of a rank before.

    All ranks call it together, in the order of the pieces, and all run the backward pass if one of
    them does. One gather of a token a rank, another of two in the backward pass.

    Args:
        x: this rank's tokens of every sequence. T may be different on every rank, and 0.
        shift: the token before the first of all; that of the group's first rank counts. The other
            ranks pass the same or None, and get a gradient of zeros.
        group: as for `torch_rwkv6.parallel.wkv`.
        cu_seqlens: as for `torch_rwkv6.parallel.wkv`: where packed sequences begin and end in all
            pieces joined. Each has its own row of shift, and a token a sequence is sent.

    Returns:
        The differences, [B, T, D], and the last token of all pieces, [B or M, D], on every rank.
        The gradients that reach it on different ranks add up.

    Raises:
        TypeError: no tensor, a DTensor, cu_seqlens that are no integers, or a group that is none.
        ValueError: a shape that does not fit; or as for `torch_rwkv6.parallel.wkv`, on all ranks.
        RuntimeError: torch.distributed is not initialised, or cu_seqlens hold values out of range.
    """
    return token_shift_of_piece(x, shift, cu_seqlens, ranks=Ranks(group), joined=True)


def token_shift_of_piece(
    x: Tensor,  # [B, T, D]
    shift: Tensor | None,  # [B or M, D]
    cu_seqlens: Tensor | None,  # [M + 1]
    *,
    ranks: Ranks,
    joined: bool = False,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B or M, D]
    """`token_shift` whose cu_seqlens are those of this rank's own piece or, `joined`, of all."""
    check_local(("x", "shift", "cu_seqlens"), (x, shift, cu_seqlens))
    if tensor("x", x).dim() != 3:
        raise ValueError(f"x: expected 3 dimensions [B, T, D], got shape {tuple(x.shape)}")
    rows, D, axes = x.shape[0], x.shape[2], "[B, D]"
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, "x", x)
        rows, axes = cu_seqlens.shape[0] - 1, "[M, D]"
    if shift is not None and shift.shape != (rows, D):
        raise ValueError(f"shift: expected {axes} = {(rows, D)}, got shape {tuple(shift.shape)}")
    if joined and cu_seqlens is not None:
        cu_seqlens = ranks.own_offsets(cu_seqlens, x.shape[1])
    first = x.new_zeros(rows, D) if shift is None else shift.to(x.dtype)
    agreed = flags(shift, needs_grad(x, shift), x)
    before, last = _Halo.apply(x, first, cu_seqlens, agreed, ranks)
    return of_a_piece(x, before, cu_seqlens)[0], last


class _Halo(torch.autograd.Function):
    """The token before this rank's piece of each sequence, and the last one of all pieces."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [B, T, D]
        first: Tensor,  # [B or M, D], of the first rank
        cu_seqlens: Tensor | None,  # [M + 1], of this rank's piece
        agreed: Tensor,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:  # [B or M, D], [B or M, D]
        have, place = _last(x, cu_seqlens)
        own = x[place].where(have, first) if x.shape[1] else first
        # A piece without a token is passed over; the first rank's passes on what was before all.
        filled = have | (ranks.own == 0)
        tokens, filled, agreed = ranks.gather(own, filled.to(x.dtype), agreed)
        check_flags("shift", agreed)
        # For each rank and sequence the nearest rank that has a token, itself or before it.
        order = torch.arange(ranks.size, device=x.device)[:, None, None]
        nearest = (order * filled.bool()).cummax(0).values  # [ranks, 1 or M, 1]
        ctx.save_for_backward(nearest, cu_seqlens)
        ctx.ranks, ctx.shape = ranks, x.shape
        ctx.set_materialize_grads(False)
        # the last token up to the end of each rank's piece
        ends = tokens.gather(0, nearest.expand_as(tokens))
        return (ends[ranks.own - 1] if ranks.own > 0 else first).clone(), ends[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_before: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        nearest, cu_seqlens = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        given = grad_before if grad_before is not None else grad_last
        assert given is not None  # autograd calls for one of them at least
        zeros = torch.zeros_like(given)
        grad_before, grad_last = (zeros if g is None else g for g in (grad_before, grad_last))
        befores, lasts = ranks.gather(grad_before, grad_last)
        seen = nearest == ranks.own  # which ranks' pieces end with the token that this one sent
        grad = torch.where(seen[:-1], befores[1:], 0).sum(0)
        grad = grad + torch.where(seen[-1], lasts.sum(0), 0)
        grad_x = grad.new_zeros(ctx.shape)
        have, place = _last(grad_x, cu_seqlens)
        if ctx.shape[1]:
            grad_x.index_put_(place, grad.where(have, 0), accumulate=True)
        grad_first = grad_before + grad.where(~have, 0) if ranks.own == 0 else zeros
        return grad_x, grad_first if ctx.needs_input_grad[1] else None, None, None, None


def _last(
    x: Tensor,  # [B, T, D]
    cu_seqlens: Tensor | None,  # [M + 1]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # [1 or M, 1], indices of x [B or M] each
    """Whether a sequence has a token, and where its last one is; anywhere if it has none."""
    if cu_seqlens is None:
        rows = torch.arange(x.shape[0], device=x.device)
        have = torch.full((1, 1), x.shape[1] > 0, device=x.device)
        return have, (rows, torch.full_like(rows, x.shape[1] - 1))
    begin, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    last = (end - 1).clamp(min=0)
    return (begin < end).unsqueeze(1), (torch.zeros_like(last), last)
