"""RWKV-6 x060 in NumPy, float64, one token after the other: the oracle of the model's tests.

Written from the paper (arXiv:2404.05892, sections 3 and 4) and the official names; it shares
nothing with torch_rwkv6.nn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def logits(weights: Mapping[str, Array], tokens: Sequence[int], ln_x_eps: float = 64e-5) -> Array:
    """The logits after every token of one sequence, [T, V]."""
    p = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    n_head, size = p["blocks.0.att.time_faaaa"].shape
    width = n_head * size
    att_last = np.zeros((layers, width))
    ffn_last = np.zeros((layers, width))
    state = np.zeros((layers, n_head, size, size))  # [key, value]
    for i in range(layers):
        if f"blocks.{i}.att.time_state" in p:  # [value, key]
            state[i] = np.swapaxes(p[f"blocks.{i}.att.time_state"], 1, 2)

    rows = []
    for token in tokens:
        x = _norm(p["emb.weight"][token], p, "blocks.0.ln0")
        for i in range(layers):
            block = f"blocks.{i}"
            now = _norm(x, p, f"{block}.ln1")
            x = x + _time_mix(now, att_last[i], state[i], p, f"{block}.att", ln_x_eps)
            att_last[i] = now
            now = _norm(x, p, f"{block}.ln2")
            x = x + _channel_mix(now, ffn_last[i], p, f"{block}.ffn")
            ffn_last[i] = now
        rows.append(p["head.weight"] @ _norm(x, p, "ln_out"))
    return np.stack(rows)


def _time_mix(
    x: Array, last: Array, state: Array, p: Mapping[str, Array], att: str, eps: float
) -> Array:
    """Output of one token; ``state`` [H, N, N] is updated in place."""
    n_head, size, _ = state.shape
    change = last - x
    low = np.tanh((x + change * p[f"{att}.time_maa_x"].ravel()) @ p[f"{att}.time_maa_w1"])
    low = low.reshape(5, -1)
    mixed = {}
    for row, name in enumerate("wkvrg"):
        mix = p[f"{att}.time_maa_{name}"].ravel() + low[row] @ p[f"{att}.time_maa_w2"][row]
        mixed[name] = x + change * mix
    r = (p[f"{att}.receptance.weight"] @ mixed["r"]).reshape(n_head, size)
    k = (p[f"{att}.key.weight"] @ mixed["k"]).reshape(n_head, size)
    v = (p[f"{att}.value.weight"] @ mixed["v"]).reshape(n_head, size)
    g = p[f"{att}.gate.weight"] @ mixed["g"]
    lora = np.tanh(mixed["w"] @ p[f"{att}.time_decay_w1"]) @ p[f"{att}.time_decay_w2"]
    decay = np.exp(-np.exp(p[f"{att}.time_decay"].ravel() + lora)).reshape(n_head, size)
    u = p[f"{att}.time_faaaa"]

    out = np.empty((n_head, size))
    for h in range(n_head):
        kv = np.outer(k[h], v[h])
        y = r[h] @ (state[h] + u[h][:, None] * kv)
        state[h] = decay[h][:, None] * state[h] + kv
        out[h] = (y - y.mean()) / np.sqrt(y.var() + eps)
    normed = out.ravel() * p[f"{att}.ln_x.weight"] + p[f"{att}.ln_x.bias"]
    return p[f"{att}.output.weight"] @ (normed * g * _sigmoid(g))


def _channel_mix(x: Array, last: Array, p: Mapping[str, Array], ffn: str) -> Array:
    change = last - x
    k = p[f"{ffn}.key.weight"] @ (x + change * p[f"{ffn}.time_maa_k"].ravel())
    r = p[f"{ffn}.receptance.weight"] @ (x + change * p[f"{ffn}.time_maa_r"].ravel())
    return _sigmoid(r) * (p[f"{ffn}.value.weight"] @ np.maximum(k, 0) ** 2)


def _norm(x: Array, p: Mapping[str, Array], name: str) -> Array:
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
