"""The operator of RWKV-4 in plain PyTorch: what its kernels must equal.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, section 3 and
appendix D: a weighted average of the values so far whose numerator a and denominator b are kept
relative to e^p, p the largest exponent among their terms, so that no exponential overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_rwkv6.contract import state_dtype

__all__ = ["wkv4", "wkv4_backward"]

START = -1e30  # the exponent p before any token: e^p is 0 beside every key


def _log_decay(w: Tensor) -> Tensor:
    """-exp(w), as far as it makes a difference. w, result: [D]."""
    return -torch.exp(torch.where(w > 80.0, 80.0, w))


def _start(k: Tensor, initial_state: Tensor | None) -> Tensor:
    """The state before the first token, [B, 3, D]."""
    if initial_state is not None:
        return initial_state
    state = torch.zeros(k.shape[0], 3, k.shape[2], dtype=state_dtype(k), device=k.device)
    state[:, 2] = START
    return state


def wkv4(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None = None,  # [B, 3, D]
) -> tuple[Tensor, Tensor]:  # y [B, T, D], final state [B, 3, D]
    """`torch.ops.rwkv6.wkv4` by the recurrence; differentiable any number of times."""
    acc = state_dtype(k)
    kf, vf, wf, uf = (x.to(acc) for x in (k, v, w, u))
    log_decay = _log_decay(wf)
    a, b, p = _start(k, initial_state).unbind(1)  # [B, D] each
    y = []
    for t in range(k.shape[1]):
        k_t, v_t = kf[:, t], vf[:, t]
        q = torch.maximum(p, uf + k_t)
        old, new = torch.exp(p - q), torch.exp(uf + k_t - q)
        y.append((old * a + new * v_t) / (old * b + new))
        q = torch.maximum(p + log_decay, k_t)
        old, new = torch.exp(p + log_decay - q), torch.exp(k_t - q)
        a, b, p = old * a + new * v_t, old * b + new, q
    return (torch.stack(y, 1) if y else kf.clone()).to(k.dtype), torch.stack((a, b, p), 1)


def wkv4_backward(
    grad_y: Tensor | None,  # [B, T, D]
    grad_final_state: Tensor | None,  # [B, 3, D]
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None = None,  # [B, 3, D]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `wkv4` for k, v [B, T, D], w, u [D] and initial_state [B, 3, D].

    Each in its input's dtype; the fifth is empty ([0], float32) where there is no initial_state.
    y does not change when a and b are taken relative to another e^p; only the state itself does,
    whose p goes where the larger exponent came from.
    """
    acc = state_dtype(k)
    kf, vf, wf, uf = (x.to(acc) for x in (k, v, w, u))
    log_decay = _log_decay(wf)
    start = _start(k, initial_state)
    states = [start.unbind(1)]  # a, b, p before each token, [B, D] each
    for t in range(k.shape[1]):
        a, b, p = states[-1]
        q = torch.maximum(p + log_decay, kf[:, t])
        old, new = torch.exp(p + log_decay - q), torch.exp(kf[:, t] - q)
        states.append((old * a + new * vf[:, t], old * b + new, q))
    grad_state = torch.zeros_like(start) if grad_final_state is None else grad_final_state
    grad_a, grad_b, grad_p = grad_state.unbind(1)
    grad_w = grad_u = torch.zeros_like(start[:, 0])  # [B, D]
    grads: list[tuple[Tensor, Tensor]] = []
    for t in reversed(range(k.shape[1])):
        (a, b, p), (a_next, b_next, _) = states[t], states[t + 1]
        k_t, v_t = kf[:, t], vf[:, t]
        # a', b', p' = old a + new v, old b + new, max(p + log_decay, k)
        kept = p + log_decay > k_t
        q = torch.maximum(p + log_decay, k_t)
        old, new = torch.exp(p + log_decay - q), torch.exp(k_t - q)
        from_old = old * (a * grad_a + b * grad_b)
        from_new = new * (v_t * grad_a + grad_b)
        grad_q = grad_p - (a_next * grad_a + b_next * grad_b)
        grad_p = from_old + torch.where(kept, grad_q, 0.0)
        grad_w = grad_w + grad_p
        grad_k = from_new + torch.where(kept, 0.0, grad_q)
        grad_v = new * grad_a
        grad_a, grad_b = old * grad_a, old * grad_b
        if grad_y is not None:  # y = (old a + new v) / (old b + new)
            q = torch.maximum(p, uf + k_t)
            old, new = torch.exp(p - q), torch.exp(uf + k_t - q)
            total = old * b + new
            y = (old * a + new * v_t) / total
            g = grad_y[:, t].to(acc) / total
            grad_a, grad_b = grad_a + old * g, grad_b - old * g * y
            grad_p = grad_p + old * g * (a - b * y)
            grad_uk = new * g * (v_t - y)
            grad_k, grad_v, grad_u = grad_k + grad_uk, grad_v + new * g, grad_u + grad_uk
        grads.append((grad_k, grad_v))
    if grads:
        gk, gv = (torch.stack(g, 1) for g in zip(*reversed(grads), strict=True))
    else:
        gk, gv = torch.zeros_like(kf), torch.zeros_like(vf)
    gw = (grad_w.sum(0) * torch.where(wf < 80.0, log_decay, 0.0)).to(w.dtype)
    gu = grad_u.sum(0).to(u.dtype)
    if initial_state is None:
        gs = torch.empty(0, dtype=torch.float32, device=k.device)
    else:
        gs = torch.stack((grad_a, grad_b, grad_p), 1)
    return gk.to(k.dtype), gv.to(v.dtype), gw, gu, gs
