"""Chooses what computes WKV: the native kernels where this backend reaches them, or keras.ops.

Every backend module has ``wkv(r, k, v, w, u, initial_state, state_map)`` over checked tensors of
the backend, `keras_adapter.ops.wkv` without its checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras

from keras_adapter.backends import chunked

Wkv = Callable[..., tuple[Any, Any]]


def _choose() -> tuple[Wkv, bool]:
    """The implementation, and whether it runs the native kernels."""
    setting = os.environ.get("OPS_KERNEL", "0")
    if setting not in ("0", "1"):
        raise ValueError(f"OPS_KERNEL: expected 0 or 1, got {setting!r}")
    backend = keras.backend.backend()
    if setting == "1":
        return chunked.wkv, False
    if backend == "torch":
        from keras_adapter.backends import torch

        return torch.wkv, torch.has_kernels
    if backend == "jax":
        from keras_adapter.backends import jax

        return jax.wkv, jax.has_kernels
    if backend == "tensorflow":
        from keras_adapter.backends import tensorflow

        return tensorflow.wkv, tensorflow.has_kernels
    return chunked.wkv, False


wkv, has_kernels = _choose()
