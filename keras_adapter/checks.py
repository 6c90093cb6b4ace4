"""Argument checks: types, shapes and dtypes of any backend's tensors, KerasTensors included.

Sizes that are None (not known yet) fit everything.
"""

from __future__ import annotations

import operator
from typing import Any

import keras
import numpy as np

FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")
INDEX_DTYPES = ("int32", "int64")
MAX_HEAD_SIZE = 256

SHOWN = 8  # the number of entries of a list that a message shows

Shape = tuple[Any, ...]  # int, or None


def prepare(
    r: Any,  # [B, T, H, N]
    k: Any,  # [B, T, H, N]
    v: Any,  # [B, T, H, N]
    w: Any,  # [B, T, H, N]
    u: Any,  # [H, N]
    initial_state: Any | None,  # [S, H, N, N]
    state_map: Any | None,  # [B]
) -> tuple[Any, ...]:
    """The arguments, checked, as tensors of the backend; KerasTensors stay as they are.

    Raises TypeError or ValueError. Values are looked at only in state_map, where they can be seen.
    """
    tokens = (("r", r), ("k", k), ("v", v), ("w", w), ("u", u))
    r, k, v, w, u = (tensor(name, x) for name, x in tokens)
    if initial_state is not None:
        initial_state = tensor("initial_state", initial_state)
    if isinstance(state_map, (list, tuple)):
        state_map = _integers("state_map", state_map)
    # A NumPy array is checked before conversion, which may cut its entries to 32 bits.
    if state_map is not None and not isinstance(state_map, np.ndarray):
        state_map = tensor("state_map", state_map)
    check_wkv(r, k, v, w, u, initial_state, state_map)
    if initial_state is not None and state_map is not None:
        _check_rows("state_map", state_map, initial_state.shape[0])
        state_map = tensor("state_map", state_map)
    return r, k, v, w, u, initial_state, state_map


def tensor(name: str, x: Any) -> Any:
    """x as a tensor of the backend; a KerasTensor stays as it is. Raises TypeError."""
    if isinstance(x, keras.KerasTensor):
        return x
    try:
        if x is None or isinstance(x, (str, bytes, dict)):
            raise TypeError("no numbers")
        return keras.ops.convert_to_tensor(x)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise TypeError(f"{name}: expected a tensor, got {described(x)}") from error


def flag(name: str, x: Any) -> bool:
    """x as a bool. Raises TypeError for all but True and False."""
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {described(x)}")
    return bool(x)


def number(name: str, x: Any, largest: int | None = None) -> int:
    """x as an int, at least 1. Raises TypeError for what is no integer, ValueError out of range."""
    value = _whole(x)
    if value is None:
        raise TypeError(f"{name}: expected an int, got {described(x)}")
    if value < 1 or (largest is not None and value > largest):
        wanted = "at least 1" if largest is None else f"1 to {largest}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return value


def check_wkv(
    r: Any,  # [B, T, H, N]
    k: Any,  # [B, T, H, N]
    v: Any,  # [B, T, H, N]
    w: Any,  # [B, T, H, N]
    u: Any,  # [H, N]
    initial_state: Any | None,  # [S, H, N, N]
    state_map: Any | None,  # [B]
) -> None:
    """Raises TypeError or ValueError; looks at no values."""
    dtype = dtype_of(r)
    check_dtype("r", r, FLOAT_DTYPES)
    if len(r.shape) != 4:
        raise ValueError(f"r: expected 4 dimensions [B, T, H, N], got shape {tuple(r.shape)}")
    batch, _, heads, size = r.shape
    if size is None or not 1 <= size <= MAX_HEAD_SIZE:
        raise ValueError(f"r: expected a head size N from 1 to {MAX_HEAD_SIZE}, got {size}")
    if heads is None or heads < 1:
        raise ValueError(f"r: expected a number of heads H from 1, got shape {tuple(r.shape)}")
    for name, x, dtypes in (
        ("k", k, (dtype,)),
        ("v", v, (dtype,)),
        ("w", w, (dtype, "float32")),
    ):
        check_dtype(name, x, dtypes, f" beside r of {dtype}")
        check_shape(name, x, tuple(r.shape), "the shape of r")
    check_dtype("u", u, (dtype, "float32"), f" beside r of {dtype}")
    check_shape("u", u, (heads, size), "[H, N]")
    if initial_state is None:
        if state_map is not None:
            raise ValueError("state_map: given without an initial state, which it would index")
        return
    check_dtype("initial_state", initial_state, (state_dtype(r), dtype), f" beside r of {dtype}")
    check_shape("initial_state", initial_state, (None, heads, size, size), "[S, H, N, N]")
    rows = initial_state.shape[0]
    if state_map is not None:
        check_dtype("state_map", state_map, INDEX_DTYPES)
        check_shape("state_map", state_map, (batch,), "[B]")
    elif rows not in (1, None, batch) and batch is not None:
        raise ValueError(
            f"initial_state: {rows} states for {batch} sequences need a state_map that says which "
            f"sequence starts from which (without one, pass 1 or {batch})"
        )


def dtype_of(x: Any) -> str:
    try:
        return str(keras.backend.standardize_dtype(x.dtype))
    except ValueError:  # one that Keras does not know, as complex128
        return str(x.dtype)


def state_dtype(r: Any) -> str:
    """The dtype of the state that belongs to inputs of r's dtype."""
    return "float64" if dtype_of(r) == "float64" else "float32"


def _integers(name: str, x: Any) -> np.ndarray[Any, Any]:
    """A list of integers as an array of int32, or of int64 where an entry needs it."""
    entries = []
    for entry in x:
        value = _whole(entry)
        if value is None:
            raise TypeError(f"{name}: expected integers, got {described(entry)} among them")
        entries.append(value)
    dtype = "int32" if all(-(2**31) <= entry < 2**31 for entry in entries) else "int64"
    try:
        return np.array(entries, dtype)
    except OverflowError as error:
        raise ValueError(f"{name}: expected integers of 64 bits, got {_some(entries)}") from error


def _whole(x: Any) -> int | None:
    """x as an int; None for anything else, bools included."""
    try:
        return None if isinstance(x, (bool, np.bool_)) else operator.index(x)
    except TypeError:
        return None


def _check_rows(name: str, x: Any, rows: int | None) -> None:
    """Raises ValueError for an entry out of range, if the values can be read."""
    values = _concrete(x)
    if values is None or rows is None:
        return
    wrong = values[(values < 0) | (values >= rows)]
    if wrong.size:
        raise ValueError(
            f"{name}: expected entries from 0 to {rows - 1} ({rows} states), "
            f"got {_some(wrong.tolist())}"
        )


def _some(entries: list[Any]) -> str:
    """The first entries of a list, for a message."""
    shown = ", ".join(str(entry)[:40] for entry in entries[:SHOWN])
    return f"[{shown}{', ...' if len(entries) > SHOWN else ''}]"


def described(x: Any) -> str:
    """A value as a message shows it: itself where that is short, or its type."""
    text = repr(x)
    return text if len(text) <= 40 and "\n" not in text else f"a {type(x).__name__}"


def check_dtype(name: str, x: Any, dtypes: tuple[str, ...], beside: str = "") -> None:
    found = dtype_of(x)
    if found not in dtypes:
        expected = " or ".join(dict.fromkeys(dtypes))
        raise TypeError(f"{name}: expected {expected}{beside}, got {found}")


def check_shape(name: str, x: Any, shape: Shape, description: str) -> None:
    found = tuple(x.shape)
    if len(found) != len(shape) or any(
        a is not None and b is not None and a != b for a, b in zip(found, shape)
    ):
        raise ValueError(f"{name}: expected {description} = {shape}, got shape {found}")


def _concrete(x: Any) -> np.ndarray[Any, Any] | None:
    """The values on the CPU; None if they are traced, or if reading them would wait for a GPU."""
    backend = keras.backend.backend()
    if isinstance(x, np.ndarray):
        return x
    if isinstance(x, keras.KerasTensor):
        return None
    if backend == "torch":
        import torch

        # the operator checks what a compiler traces, when it runs
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.device.type != "cpu":
            return None
        from torch_rwkv6._torch_private import concrete

        found = concrete(x)
        return None if found is None else found.numpy()
    if backend == "jax":
        import jax

        if isinstance(x, jax.core.Tracer) or not x.is_fully_addressable:
            return None
        return np.asarray(x) if all(d.platform == "cpu" for d in x.devices()) else None
    if backend == "tensorflow":
        import tensorflow as tf

        return None if tf.is_symbolic_tensor(x) or "GPU" in x.device else x.numpy()
    return None
