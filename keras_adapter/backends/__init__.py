"""Chooses what computes WKV: the native kernels where the backend can call them, or keras.ops.

Every backend module has ``wkv(r, k, v, w, u, initial_state, state_map)`` over checked tensors of
the backend, `keras_adapter.ops.wkv` without its checks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import keras

from keras_adapter.backends import chunked
from keras_adapter.checks import flag

Wkv = Callable[..., tuple[Any, Any]]

_SETTING = os.environ.get("OPS_KERNEL", "0")
if _SETTING not in ("0", "1"):
    raise ValueError(f"OPS_KERNEL: expected 0 or 1, got {_SETTING!r}")


def choose(high_level: bool | None = None, axis_name: Any | None = None) -> Wkv:
    """The implementation: keras.ops, or the backend's own; None follows OPS_KERNEL.

    axis_name: that of pieces of sequences, see `keras_adapter.ops.wkv`.
    """
    if high_level is not None:
        high_level = flag("high_level", high_level)
    elif _SETTING == "1":
        high_level = True
    compute = _high_level() if high_level else (_found or _of_backend())[0]
    if axis_name is None:
        return compute
    backend = keras.backend.backend()
    if backend != "jax":
        raise ValueError(
            f"axis_name: expected None on the {backend} backend, as it is for jax.shard_map, got "
            f"{axis_name!r} (on torch, torch_rwkv6.parallel.wkv takes sequences in pieces)"
        )
    from keras_adapter.backends import jax_pieces

    return jax_pieces.over_pieces(compute, axis_name)


def _high_level() -> Wkv:
    if keras.backend.backend() != "jax":
        return chunked.wkv
    from keras_adapter.backends import jax_chunks, jax_mesh

    return jax_mesh.with_auto_axes(jax_chunks.wkv)


def _of_backend() -> tuple[Wkv, bool]:
    """The backend's implementation, and whether it runs the native kernels."""
    backend = keras.backend.backend()
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


if keras.backend.backend() == "torch":
    # Registers an operator, which an exported .pt2 file may contain.
    from keras_adapter.backends import torch_chunks  # noqa: F401

_found = _of_backend() if _SETTING == "0" else None  # otherwise loaded on demand
has_kernels: bool = _found is not None and _found[1]
