"""The WKV6 recurrence in plain PyTorch: what every kernel of this package must equal.

`recurrence` is the operator in three lines (Peng et al., "Eagle and Finch", arXiv:2404.05892,
section 4.2); `wkv` and `wkv_backward` add the options of `torch.ops.rwkv6.wkv`. They run on every
device and in every dtype, can be differentiated any number of times and are understood by every
`torch.func` transform. They are slow, a few PyTorch calls per token: `torch_rwkv6.chunked` is what
runs where there is no kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_rwkv6.contract import state_dtype

__all__ = ["recurrence", "recurrence_backward", "wkv", "wkv_backward"]


def log_decay(w: Tensor) -> Tensor:
    """-exp(w), with w clamped where the decay is 0 anyway. w, result: [...]."""
    # exp(-exp(7)) is exactly 0 even in float64, so the bound changes no decay. Without it the
    # derivative of a large w would be inf * 0 instead of 0. (clamp has no derivative at NaN.)
    return -torch.exp(torch.minimum(w, torch.full((), 7.0, dtype=w.dtype, device=w.device)))


def decay_and_lost(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """exp(log_decay), differentiable, and its rounding error. log_decay, results: [...].

    A decay near 1 has few digits left for 1 - decay, and over thousands of tokens the same rounding
    error adds up. Fast decays need no correction, because the state forgets their errors.
    """
    factor, detached = torch.exp(log_decay), log_decay.detach()
    lost = (1 - factor.detach()) + torch.expm1(detached)
    return factor, torch.where(factor.detach() > 0.5, lost, 0.0)


def _decayed(state: Tensor, decay: Tensor, lost: Tensor, added: Tensor | float) -> Tensor:
    """decay * state + added, with the decay's rounding error `lost` corrected.

    state, added and the result are [B, H, N, N]; decay and lost [B, H, N].
    """
    return decay[..., None] * state + (lost[..., None] * state + added)


def recurrence(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N], [key, value]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final state [B, H, N, N]
    """y_t = r_t (S + u k_t v_t),  S = exp(-exp(w_t)) S + k_t v_t.  All tensors of one dtype."""
    factor, lost = decay_and_lost(log_decay(w))
    y = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]  # [B, H, N, N]
        y.append((r[:, t, :, :, None] * (state + u[:, :, None] * kv)).sum(-2))
        state = _decayed(state, factor[:, t], lost[:, t], kv)
    return (torch.stack(y, 1) if y else r.clone()), state  # T = 0


def recurrence_backward(
    grad_y: Tensor | None,  # [B, T, H, N]
    grad_state: Tensor | None,  # [B, H, N, N], of the final state
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N], the initial state
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `recurrence` for r, k, v, w [B, T, H, N], u [H, N] and state [B, H, N, N].

    The adjoint G of the state is computed backward in time, G = decay_t G + r_t grad_y_t, from the
    states of the forward pass, which are computed first. The gradient of w is
    -exp(w) decay * sum_j S[i][j] G[i][j].
    """
    exponent = log_decay(w)
    factor, lost = decay_and_lost(exponent)
    slope = exponent * factor  # d decay / d w
    states = [state]
    for t in range(r.shape[1] - 1):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        states.append(_decayed(states[-1], factor[:, t], lost[:, t], kv))
    grads: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    grad_u = torch.zeros_like(u)
    for t in reversed(range(r.shape[1])):
        r_t, k_t, v_t = r[:, t], k[:, t], v[:, t]  # [B, H, N]
        gr, gk, gv = (torch.zeros_like(x) for x in (r_t, k_t, v_t))
        gw = slope[:, t] * 0.0  # NaN where the decay is NaN, even if nothing depends on it
        if grad_state is not None:
            gk = (grad_state * v_t[:, :, None, :]).sum(-1)
            gv = (grad_state * k_t[:, :, :, None]).sum(-2)
            gw = slope[:, t] * (states[t] * grad_state).sum(-1)
        added = None  # to the gradient of the state
        if grad_y is not None:
            g_t = grad_y[:, t]  # [B, H, N]
            vg = (v_t * g_t).sum(-1, keepdim=True)  # [B, H, 1]
            ruk = (r_t * u * k_t).sum(-1, keepdim=True)  # [B, H, 1]
            gr = (states[t] * g_t[:, :, None, :]).sum(-1) + u * k_t * vg
            gk, gv = gk + u * r_t * vg, gv + ruk * g_t
            grad_u = grad_u + (r_t * k_t * vg).sum(0)
            added = r_t[..., None] * g_t[:, :, None, :]
        grads.append((gr, gk, gv, gw))
        if grad_state is None:
            grad_state = added
        else:
            kept = 0.0 if added is None else added
            grad_state = _decayed(grad_state, factor[:, t], lost[:, t], kept)
    if grad_state is None:
        grad_state = torch.zeros_like(state)
    if grads:
        gr, gk, gv, gw = (torch.stack(g, 1) for g in zip(*reversed(grads), strict=True))
    else:
        gr, gk, gv, gw = (torch.zeros_like(x) for x in (r, k, v, w))
    return gr, gk, gv, gw, grad_u, grad_state


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final state [B or M, H, N, N]
    """`torch.ops.rwkv6.wkv` by the recurrence. A state_map entry out of range gives NaN."""
    acc = state_dtype(r)
    state = initial_states(r, initial_state, state_map, cu_seqlens)
    rf, kf, vf, wf, uf = (x.to(acc) for x in (r, k, v, w, u))
    if cu_seqlens is None:
        y, new = recurrence(rf, kf, vf, wf, uf, state)
        return y.to(r.dtype), _fresh(new, state)
    outputs = []
    start = state
    for t, row in enumerate(_sequence_of_token(r.shape[1], cu_seqlens)):
        now = slice(t, t + 1)
        y, new = recurrence(
            rf[:, now], kf[:, now], vf[:, now], wf[:, now], uf, state.index_select(0, row)
        )
        state = state.index_copy(0, row, new)
        outputs.append(y)
    return (torch.cat(outputs, 1) if outputs else rf.clone()).to(r.dtype), _fresh(state, start)


def wkv_backward(
    grad_y: Tensor | None,  # [B, T, H, N]
    grad_final_state: Tensor | None,  # [B or M, H, N, N]
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`torch.ops.rwkv6.wkv_backward`: each gradient in its input's dtype, in the order of `wkv`.

    The sixth is empty ([0], float32) where there is no initial_state.
    """
    acc = state_dtype(r)
    state = initial_states(r, initial_state, state_map, cu_seqlens)
    grad_y = None if grad_y is None else grad_y.to(acc)
    grad_state = None if grad_final_state is None else grad_final_state.to(acc)
    rf, kf, vf, wf, uf = (x.to(acc) for x in (r, k, v, w, u))
    if cu_seqlens is None:
        gr, gk, gv, gw, gu, gs = recurrence_backward(grad_y, grad_state, rf, kf, vf, wf, uf, state)
    else:
        rows = _sequence_of_token(r.shape[1], cu_seqlens)
        states = []  # before each token
        for t, row in enumerate(rows):
            now = slice(t, t + 1)
            states.append(state.index_select(0, row))
            _, new = recurrence(rf[:, now], kf[:, now], vf[:, now], wf[:, now], uf, states[t])
            state = state.index_copy(0, row, new)
        tokens = []
        gu = torch.zeros_like(uf)
        gs = torch.zeros_like(state) if grad_state is None else grad_state
        later = None  # the sequence of the following token
        for t, row in reversed(list(enumerate(rows))):
            now = slice(t, t + 1)
            g_t = None if grad_y is None else grad_y[:, now]
            inputs = (rf[:, now], kf[:, now], vf[:, now], wf[:, now], uf, states[t])
            found: tuple[Tensor, ...] = recurrence_backward(g_t, gs.index_select(0, row), *inputs)
            if grad_state is None:  # nothing depends on the state after a sequence's last token
                last = recurrence_backward(g_t, None, *inputs)
                if later is None:
                    found = last
                else:
                    pairs = zip(last, found, strict=True)
                    found = tuple(torch.where(row == later, y, x) for x, y in pairs)
            *token, gu_t, new = found
            later = row
            gs = gs.index_copy(0, row, new)
            gu = gu + gu_t
            tokens.append(token)
        if tokens:
            gr, gk, gv, gw = (torch.cat(g, 1) for g in zip(*reversed(tokens), strict=True))
        else:
            gr, gk, gv, gw = (torch.zeros_like(x) for x in (rf, kf, vf, wf))
    return (
        gr.to(r.dtype),
        gk.to(k.dtype),
        gv.to(v.dtype),
        gw.to(w.dtype),
        gu.to(u.dtype),
        grad_initial_state(_fresh(gs, grad_state), initial_state, state_map),
    )


def _fresh(state: Tensor, start: Tensor | None) -> Tensor:
    """state [...], copied where T = 0 has left it the caller's own tensor."""
    return state.clone() if state is start else state


def initial_states(
    r: Tensor,  # [B, T, H, N]
    initial_state: Tensor | None,  # [S, H, N, N]
    state_map: Tensor | None,  # [B] or [M]
    cu_seqlens: Tensor | None,  # [M + 1]
) -> Tensor:
    """The state each sequence starts from: [B or M, H, N, N]."""
    sequences = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    acc = state_dtype(r)
    if initial_state is None:
        heads, size = r.shape[2:]
        return torch.zeros(sequences, heads, size, size, dtype=acc, device=r.device)
    state = initial_state.to(acc)
    if state_map is None:
        return state.expand(sequences, *state.shape[1:])
    rows = state.shape[0]
    found = state.index_select(0, state_map.clamp(0, rows - 1))
    valid = (state_map >= 0) & (state_map < rows)
    return torch.where(valid[:, None, None, None], found, torch.nan)


def grad_initial_state(
    grad: Tensor,  # [B or M, H, N, N], of each sequence's own initial state
    initial_state: Tensor | None,  # [S, H, N, N]
    state_map: Tensor | None,  # [B] or [M]
) -> Tensor:  # [S, H, N, N]
    if initial_state is None:
        return torch.empty(0, dtype=torch.float32, device=grad.device)
    rows = initial_state.shape[0]
    if state_map is not None:
        # Added one sequence after the other, in a fixed order, which index_add does not promise on
        # every device. Selected by where, because a product with 0 would spread NaN.
        numbers = torch.arange(rows, device=grad.device)[:, None, None, None]
        total = torch.zeros(rows, *grad.shape[1:], dtype=grad.dtype, device=grad.device)
        for m in range(state_map.shape[0]):
            total = total + torch.where(numbers == state_map[m : m + 1], grad[m : m + 1], 0.0)
        grad = total
    elif rows != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.to(initial_state.dtype)


def _sequence_of_token(tokens: int, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """For each of the T tokens the index of its packed sequence, as T tensors of shape [1].

    No value is read on the host, so this can be traced.
    """
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    last = max(cu_seqlens.shape[0] - 2, 0)
    sequence = (torch.searchsorted(cu_seqlens, positions, right=True) - 1).clamp(0, last)
    return sequence.split(1)[:tokens]  # without tokens, split returns one empty tensor
