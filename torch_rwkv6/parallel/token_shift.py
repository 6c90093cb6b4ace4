"""The token shift over a sequence of which every process has a piece."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_rwkv6.arguments import needs_grad, tensor
from torch_rwkv6.nn.token_shift import token_shift as of_a_piece
from torch_rwkv6.parallel.ranks import Ranks, check_flags, check_local, flags


def token_shift(
    x: Tensor,  # [B, T, D], this rank's piece
    shift: Tensor | None,  # [B, D], the last token before all pieces; None is zeros
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, D]
    """The previous token minus this one, where the first token's is the last one of a rank before.

    All ranks call it together, in the order of the pieces, and all run the backward pass if one of
    them does. One gather of a token a rank, another of two in the backward pass.

    Args:
        x: this rank's tokens of every sequence. T may be different on every rank, and 0.
        shift: the token before the first of all; that of the group's first rank counts. The other
            ranks pass the same or None, and get a gradient of zeros.
        group: as for `torch_rwkv6.parallel.wkv`.

    Returns:
        The differences, [B, T, D], and the last token of all pieces, [B, D], on every rank. The
        gradients that reach it on different ranks add up.

    Raises:
        TypeError: no tensor, a DTensor, or a group that is none.
        ValueError: a shape that does not fit; or as for `torch_rwkv6.parallel.wkv`, on all ranks.
        RuntimeError: torch.distributed is not initialised.
    """
    ranks = Ranks(group)
    check_local(("x", "shift"), (x, shift))
    if tensor("x", x).dim() != 3:
        raise ValueError(f"x: expected 3 dimensions [B, T, D], got shape {tuple(x.shape)}")
    B, _, D = x.shape
    if shift is not None and shift.shape != (B, D):
        raise ValueError(f"shift: expected [B, D] = {(B, D)}, got shape {tuple(shift.shape)}")
    first = None if shift is None else shift.to(x.dtype)
    before, last = _Halo.apply(x, first, ranks, needs_grad(x, first))
    return of_a_piece(x, before)[0], last


class _Halo(torch.autograd.Function):
    """The token before this rank's piece, and the last one of all pieces."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, ranks: Ranks, records: bool
    ) -> tuple[Tensor, Tensor]:  # [B, D], [B, D]
        first = x.new_zeros(x.shape[0], x.shape[2]) if shift is None else shift.clone()
        own = x[:, -1] if x.shape[1] else first
        # An empty piece is passed over; on the first rank it passes on what was before all.
        filled = ranks.own == 0 or x.shape[1] > 0
        agreed = flags(shift, records, x)
        tokens, have, agreed = ranks.gather(own, x.new_full((1,), filled), agreed)
        check_flags("shift", agreed)
        # For each rank the nearest one that has a token, itself or before it.
        order = torch.arange(ranks.size, device=x.device)
        nearest = (order * have[:, 0].bool()).cummax(0).values
        ctx.save_for_backward(nearest)
        ctx.ranks, ctx.shape = ranks, x.shape
        ctx.set_materialize_grads(False)
        ends = tokens.index_select(0, nearest)  # the last token up to the end of each rank's piece
        return ends[ranks.own - 1].clone() if ranks.own > 0 else first, ends[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_before: Tensor | None, grad_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (nearest,) = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        given = grad_before if grad_before is not None else grad_last
        assert given is not None  # autograd calls for one of them at least
        zeros = torch.zeros_like(given)
        grad_before, grad_last = (zeros if g is None else g for g in (grad_before, grad_last))
        befores, lasts = ranks.gather(grad_before, grad_last)
        seen = (nearest[:-1] == ranks.own)[:, None, None]  # by which of the ranks behind the first
        grad = torch.where(seen, befores[1:], 0).sum(0)
        grad = grad + torch.where(nearest[-1] == ranks.own, lasts.sum(0), 0)
        grad_x, grad_shift = grad.new_zeros(ctx.shape), zeros
        if ctx.shape[1]:
            grad_x[:, -1] = grad
        if ranks.own == 0:
            grad_shift = grad_before if ctx.shape[1] else grad_before + grad
        return grad_x, grad_shift if ctx.needs_input_grad[1] else None, None, None
