"""WKV and its gradient in NumPy float64, one token after the other: the oracle of these tests.

Written from the equations (csrc/README.md has the gradient's); it shares nothing with the code.
"""

from __future__ import annotations

import numpy as np


def wkv(r, k, v, w, u, initial_state=None, state_map=None):
    """r, k, v, w [B, T, H, N], u [H, N], initial_state [S, H, N, N], state_map [B] -> y, state."""
    y, states = _walk(*_double(r, k, v, w, u), _rows(r, initial_state, state_map))
    return y, states[-1]


def gradients(grad_y, grad_state, r, k, v, w, u, initial_state=None, state_map=None):
    """The gradients of r, k, v, w, u and initial_state (zeros' gradient where it is None)."""
    r, k, v, w, u = _double(r, k, v, w, u)
    rows = _rows(r, initial_state, state_map)
    _, states = _walk(r, k, v, w, u, rows)
    with np.errstate(over="ignore"):
        decay = np.exp(-np.exp(w))
        decay_slope = -np.exp(np.where(w > 700, -np.inf, w - np.exp(w)))
    grads = [np.zeros_like(x) for x in (r, k, v, w)]
    grad_u = np.zeros_like(u)
    G = grad_state.astype("float64")  # the gradient of the state after token t
    for t in reversed(range(r.shape[1])):
        S, dy = states[t], grad_y[:, t].astype("float64")
        vdy = (v[:, t] * dy).sum(-1, keepdims=True)
        grads[0][:, t] = np.einsum("bhij,bhj->bhi", S, dy) + u * k[:, t] * vdy
        grads[1][:, t] = np.einsum("bhij,bhj->bhi", G, v[:, t]) + u * r[:, t] * vdy
        ruk = (r[:, t] * u * k[:, t]).sum(-1, keepdims=True)
        grads[2][:, t] = np.einsum("bhij,bhi->bhj", G, k[:, t]) + ruk * dy
        grads[3][:, t] = decay_slope[:, t] * np.einsum("bhij,bhij->bhi", S, G)
        grad_u += (r[:, t] * k[:, t] * vdy).sum(0)
        G = decay[:, t][..., None] * G + r[:, t][..., None] * dy[..., None, :]
    if initial_state is None:
        return (*grads, grad_u, G)
    grad_initial = np.zeros(initial_state.shape)
    for b, row in enumerate(_index(r.shape[0], initial_state, state_map)):
        grad_initial[row] += G[b]
    return (*grads, grad_u, grad_initial)


def _double(*arrays):
    return tuple(np.asarray(x).astype("float64") for x in arrays)


def _index(batch, initial_state, state_map):
    if state_map is not None:
        return list(state_map)
    return [0] * batch if len(initial_state) == 1 else list(range(batch))


def _rows(r, initial_state, state_map):
    batch, _, heads, size = r.shape
    if initial_state is None:
        return np.zeros((batch, heads, size, size))
    return initial_state.astype("float64")[_index(batch, initial_state, state_map)]


def _walk(r, k, v, w, u, state):
    """y, and the states before every token and after the last."""
    y, states = np.zeros_like(r), [state]
    with np.errstate(over="ignore"):
        decay = np.exp(-np.exp(w))
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        y[:, t] = np.einsum("bhi,bhij->bhj", r[:, t], states[-1] + u[:, :, None] * kv)
        states.append(decay[:, t][..., None] * states[-1] + kv)
    return y, states
