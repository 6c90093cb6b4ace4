"""The recurrence in NumPy float64, written from the equations alone: the oracle of the oracle.

torch_rwkv6.reference is what most tests compare with; test_reference.py compares it with this.
"""

from __future__ import annotations

import numpy as np


def wkv(r, k, v, w, u, state):
    """r, k, v, w [B, T, H, N], u [H, N], state [B, H, N, N] -> y [B, T, H, N], state."""
    B, T, H, N = r.shape
    y = np.zeros_like(r)
    state = state.copy()
    for b in range(B):
        for h in range(H):
            S = state[b, h]
            for t in range(T):
                for j in range(N):
                    y[b, t, h, j] = sum(
                        r[b, t, h, i] * (S[i, j] + u[h, i] * k[b, t, h, i] * v[b, t, h, j])
                        for i in range(N)
                    )
                with np.errstate(over="ignore"):
                    decay = np.exp(-np.exp(w[b, t, h]))
                S[:] = decay[:, None] * S + k[b, t, h][:, None] * v[b, t, h][None, :]
    return y, state
