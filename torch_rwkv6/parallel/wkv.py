"""WKV6 over a sequence of which every process has a piece.

A piece takes the state S at its beginning to D * S + F at its end, where F is its final state from
zeros and D = exp(-sum_t exp(w_t)) its decay, one for each key. So one gather of (D, F) tells every
rank the state that it begins with. The gradient of the state runs through the pieces backwards in
the same way: G at a piece's end becomes D * G + E at its beginning. E is again a final state from
zeros, of the same recurrence on the reversed piece, with k = r and v = the gradient of y.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_rwkv6.arguments import needs_grad, tensor
from torch_rwkv6.checks import check
from torch_rwkv6.contract import WKV, WKV_BACKWARD, WKV_FINAL_STATE
from torch_rwkv6.parallel.ranks import Ranks, check_flags, check_local, flags
from torch_rwkv6.registration.autocast import cast_all

_wkv, _wkv_backward, _final_state = WKV.overload, WKV_BACKWARD.overload, WKV_FINAL_STATE.overload


def wkv(
    r: Tensor,  # [B, T, H, N], this rank's piece
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [1 or B or M, H, N, N]
    *,
    group: dist.ProcessGroup | None,
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B or M, H, N, N]
    """`torch_rwkv6.wkv` over sequences that are cut into one piece for each rank of a group.

    All ranks call it together, in the order of the pieces, and all run the backward pass if one of
    them does. Each computes its own piece, and one gather of a state and a decay a rank tells it
    how the others' pieces end; another of two states a rank in the backward pass. The results are
    those of one process, but for rounding.

    Args:
        r, k, v, w: as for `torch_rwkv6.wkv`, this rank's tokens of every sequence. T may be
            different on every rank, and 0.
        u: [H, N], the same on all ranks. Its gradient on a rank is this rank's share, which data
            parallelism adds up.
        initial_state: the state before the first token of all; that of the group's first rank
            counts. The other ranks pass the same or None, and get a gradient of zeros. If it is all
            that needs a gradient, all ranks pass it.
        group: a ``torch.distributed.ProcessGroup`` whose ranks have the pieces in their order;
            None is all processes.
        cu_seqlens: [M + 1], where packed sequences begin and end in all pieces joined, the same on
            all ranks. B must be 1. A sequence may begin and end on any rank. The ranks then tell
            each other M rows of states, after a gather of their numbers of tokens.

    Returns:
        y of this rank's tokens, [B, T, H, N], and the state after the last token of all,
        [B or M, H, N, N], on every rank. The gradients that reach it on different ranks add up.
        First derivatives only.

    Raises:
        TypeError, ValueError: as for `torch_rwkv6.wkv`; or a DTensor, or a group that is none.
        ValueError: initial_state is given, but not on the first rank; or autograd records the call
            on some ranks only. All ranks raise it. (Neither is checked on a GPU, where a look at
            values would stall the stream.)
        RuntimeError: torch.distributed is not initialised, or cu_seqlens hold values out of range.
    """
    ranks = Ranks(group)
    return wkv_of_piece(
        r, k, v, w, u, initial_state, cu_seqlens=cu_seqlens, ranks=ranks, joined=True
    )


def wkv_of_piece(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [1 or B or M, H, N, N]
    *,
    cu_seqlens: Tensor | None,  # [M + 1]
    ranks: Ranks,
    joined: bool = False,
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B or M, H, N, N]
    """`wkv` whose cu_seqlens are those of this rank's own piece or, `joined`, of all of them."""
    arguments: tuple[Any, ...] = (r, k, v, w, u, initial_state, None, cu_seqlens)
    check_local([a.name for a in WKV.arguments], arguments)
    device = tensor("r", r).device.type
    if torch.is_autocast_enabled(device):
        arguments = cast_all(WKV, arguments, torch.get_autocast_dtype(device))
    check(WKV, arguments)
    *floats, _, cu_seqlens = arguments
    if joined and cu_seqlens is not None:
        cu_seqlens = ranks.own_offsets(cu_seqlens, r.shape[1])
    with torch.amp.autocast(device, enabled=False):
        return _Wkv.apply(*floats, cu_seqlens, ranks, needs_grad(*floats))


def _from_zeros(k: Tensor, v: Tensor, w: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The final state of tokens before which the state is zeros, [B or M, H, N, N]."""
    state: Tensor = _final_state(k, v, w, None, None, cu_seqlens)
    return state


def _decay(w: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is left of each key's row of the state after all tokens, [B or M, H, N]."""
    rates = w.to(dtype).exp()  # [B, T, H, N]
    if cu_seqlens is None:
        return (-rates.sum(1)).exp()
    sums = torch.segment_reduce(rates[0], "sum", offsets=cu_seqlens, axis=0, initial=0)
    return (-sums).exp()


def _carry(
    state: Tensor,  # [B or M, H, N, N]
    decays: Tensor,  # [ranks, B or M, H, N]
    added: Tensor,  # [ranks, B or M, H, N, N]
    order: Iterable[int],
    own: int,
) -> tuple[Tensor, Tensor]:
    """The state that reaches the piece of rank `own`, and that behind the last piece."""
    reaches = state
    for rank in order:
        if rank == own:
            reaches = state
        state = decays[rank].unsqueeze(-1) * state + added[rank]
    return reaches, state


class _Wkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        w: Tensor,
        u: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        ranks: Ranks,
        records: bool,
    ) -> tuple[Tensor, Tensor]:
        if ranks.own == 0:
            state = initial_state
            y, final = _wkv(r, k, v, w, u, state, None, cu_seqlens)
        else:
            final = _from_zeros(k, v, w, cu_seqlens)
        decay = _decay(w, cu_seqlens, final.dtype)
        agreed = flags(initial_state, records, final)
        finals, decays, agreed = ranks.gather(final, decay, agreed)
        check_flags("initial_state", agreed)
        order = range(ranks.size)
        before, final = _carry(torch.zeros_like(final), decays, finals, order, ranks.own)
        if ranks.own > 0:
            state = before
            y, _ = _wkv(r, k, v, w, u, state, None, cu_seqlens)
        ctx.save_for_backward(r, k, v, w, u, initial_state, state, cu_seqlens, decays)
        ctx.ranks = ranks
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        r, k, v, w, u, initial_state, state, cu_seqlens, decays = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        with torch.amp.autocast(r.device.type, enabled=False):
            shape = (*decays.shape[1:], decays.shape[-1])
            zeros = decays.new_zeros(shape)
            added = zeros
            if ranks.own > 0 and grad_y is not None:  # nothing asks for that of the first piece
                added = _state_gradient(r, w, grad_y, cu_seqlens)
            all_added, all_grads = ranks.gather(
                added, zeros if grad_final_state is None else grad_final_state
            )
            order = reversed(range(ranks.size))
            grad, _ = _carry(all_grads.sum(0), decays, all_added, order, ranks.own)
            found = _wkv_backward(grad_y, grad, r, k, v, w, u, state, None, cu_seqlens)
        *grads, grad_state = found
        if ranks.own > 0 and initial_state is not None:  # what it got is that of `state`
            grad_state = torch.zeros_like(initial_state)
        grads = [g if n else None for g, n in zip([*grads, grad_state], ctx.needs_input_grad)]
        return (*grads, None, None, None)


def _state_gradient(r: Tensor, w: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What a piece's grad_y adds to the gradient of the state before it, [B or M, H, N, N]."""
    key, value, decay = r.flip(1), grad_y.flip(1), w.flip(1)
    if cu_seqlens is None:
        return _from_zeros(key, value, decay, None)
    # The sequences are in the opposite order too.
    return _from_zeros(key, value, decay, (r.shape[1] - cu_seqlens).flip(0)).flip(0)
