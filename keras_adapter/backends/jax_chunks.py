"""The chunked form on JAX, in full precision: on a GPU, XLA would otherwise multiply in TF32."""

from __future__ import annotations

from typing import Any

import jax

from keras_adapter.backends import chunked

Array = Any


def wkv(
    r: Array,  # [B, T, H, N]
    k: Array,  # [B, T, H, N]
    v: Array,  # [B, T, H, N]
    w: Array,  # [B, T, H, N]
    u: Array,  # [H, N], or [B, 1, H, N]
    initial_state: Array | None = None,  # [S, H, N, N]
    state_map: Array | None = None,  # [B]
) -> tuple[Array, Array]:  # y [B, T, H, N], final_state [B, H, N, N]
    with jax.default_matmul_precision("highest"):  # gradients inherit it
        return chunked.wkv(r, k, v, w, u, initial_state, state_map)
