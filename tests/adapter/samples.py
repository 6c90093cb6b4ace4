"""Inputs of WKV as NumPy arrays."""

from __future__ import annotations

import ml_dtypes
import numpy as np

EXTREME_DECAYS = (5.0, 10.0, 20.0, 90.0, -1e9)


def random_inputs(
    B=2, T=33, H=2, N=8, dtype="float32", *, seed=0, states=None, w_dtype=None, extreme=True
):
    """[r, k, v, w, u] and, with `states`, initial_state [states, H, N, N].

    w ~ N(-2, 1), with 1 % of its entries at each of EXTREME_DECAYS; the others ~ N(0, 1).
    """
    g = np.random.default_rng(seed)
    r, k, v, w = (g.standard_normal((B, T, H, N)) for _ in range(4))
    w -= 2
    if extreme:
        place = g.random(w.shape)
        for i, value in enumerate(EXTREME_DECAYS):
            w[(place >= i / 100) & (place < (i + 1) / 100)] = value
    inputs = [cast(x, dtype) for x in (r, k, v)]
    inputs += [cast(w, w_dtype or dtype), cast(g.standard_normal((H, N)), dtype)]
    if states is not None:
        acc = "float64" if dtype == "float64" else "float32"
        inputs.append(g.standard_normal((states, H, N, N)).astype(acc))
    return inputs


def random_grads(B=2, T=33, H=2, N=8, dtype="float32", *, seed=1):
    """Gradients of y and of the final state."""
    g = np.random.default_rng(seed)
    acc = "float64" if dtype == "float64" else "float32"
    grad_y = cast(g.standard_normal((B, T, H, N)), dtype)
    return [grad_y, g.standard_normal((B, H, N, N)).astype(acc)]


def cast(x, dtype):
    return x.astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))


def flat(x):
    """[B, T, H, N] -> [B, T, C]"""
    return x.reshape(*x.shape[:2], -1)
