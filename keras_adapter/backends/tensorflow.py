"""WKV on TensorFlow: keras.ops in chunks, or the native kernels where they can be called.

TensorFlow's op XlaCallModule runs a StableHLO module that contains our custom calls. Both the op
and the registration of custom calls are private to TensorFlow, so a probe must succeed first.
``RWKV6_TF_NATIVE=1`` uses the kernels everywhere and raises if they do not work; 0 never uses them.
If it is unset, eager calls use them if they work, and a tf.function does not, because its graph may
be saved and run where they are not registered.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from keras_adapter import _library
from keras_adapter.backends import chunked
from keras_adapter.checks import state_dtype

Tensor = Any
Tensors = tuple[Tensor, ...]
Dims = tuple[tuple[int, int], ...]  # of a result: as dimension d of operand o, (o, d) each

_SETTING = os.environ.get("RWKV6_TF_NATIVE")
if _SETTING not in (None, "0", "1"):
    raise ValueError(f"RWKV6_TF_NATIVE: expected 0 or 1, got {_SETTING!r}")


def _register() -> str:
    """Registers the custom calls with TensorFlow. Returns why that failed, or an empty string."""
    if _SETTING == "0":
        return "RWKV6_TF_NATIVE=0"
    binding = _library.load()
    if binding is None:
        return "the XLA binding is not built"
    try:
        runtime = ctypes.CDLL(str(Path(tf.__file__).with_name("libtensorflow_cc.so.2")))
        get_api = runtime._ZN3xla3ffi12GetXlaFfiApiEv  # xla::ffi::GetXlaFfiApi()
    except (OSError, AttributeError) as error:
        return str(error)
    get_api.restype = ctypes.c_void_p
    binding.rwkv6_xla_register.argtypes = [ctypes.c_void_p]
    return "TensorFlow refused the handlers" if binding.rwkv6_xla_register(get_api()) else ""


_problem = _register()
has_kernels: bool = not _problem
if _SETTING == "1" and not has_kernels:
    raise RuntimeError(f"RWKV6_TF_NATIVE=1: the native kernels cannot be reached: {_problem}")


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None,  # [S, H, N, N]
    state_map: Tensor | None,  # [B]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B, H, N, N]
    if not _use_kernels():
        return chunked.wkv(r, k, v, w, u, initial_state, state_map)
    heads, size = u.shape
    # in the dtype of the state, because the gradients of u are still to be summed over the batch
    u = tf.broadcast_to(tf.cast(u, state_dtype(r)), (tf.shape(r)[0], heads, size))
    operands = [r, k, v, w, u]
    states = 0
    if initial_state is not None:
        operands.append(chunked.state_of_each(r, initial_state, state_map, state_dtype(r)))
        if state_map is not None and initial_state.shape[0] is not None:
            states = initial_state.shape[0]
            # an entry out of range is an error of the custom call, which takes 32 bits; where it
            # cannot be told how many states there are, the state is NaN
            narrow = tf.clip_by_value(state_map, tf.int32.min, tf.int32.max)
            operands.append(tf.cast(narrow, tf.int32))
    operands = [tf.ensure_shape(x, (r.shape[0], *x.shape[1:])) for x in operands]
    y, final_state = _native(states)(*operands)
    return y, final_state


def _use_kernels() -> bool:
    if not has_kernels or (_SETTING is None and not tf.executing_eagerly()):
        return False
    return _probe()


@functools.cache
def _probe() -> bool:
    """Whether one token gives the right result. Runs at the first call, as it starts TensorFlow."""
    one = tf.ones((1, 1, 1, 1))
    try:
        with tf.init_scope(), tf.device("CPU"):
            y, state = _native(0)(one, one, one, one, tf.ones((1, 1, 1)))
            works = bool(tf.reduce_all(y == 1.0)) and bool(tf.reduce_all(state == 1.0))
    except (tf.errors.OpError, AttributeError, ImportError, TypeError, ValueError):
        if _SETTING == "1":
            raise
        return False
    return works and not tf.config.list_logical_devices("GPU")


@functools.cache
def _native(states: int) -> Callable[..., Tensors]:
    """WKV of r, k, v, w, u [B, H, N] and perhaps state and state_map [B]; states: see there."""

    @tf.custom_gradient
    def wkv(*operands: Tensor) -> tuple[Tensors, Callable[..., Any]]:
        r = operands[0]
        state: Dims = ((0, 0), (0, 2), (0, 3), (0, 3))
        results = ((_dims_of(0, r), r.dtype), (state, tf.as_dtype(state_dtype(r))))
        outputs = _call(_library.FORWARD, operands, results, states)

        def gradient(*grads: Tensor) -> tuple[Any, ...]:
            return (*backward(*grads, *operands), *(None for _ in operands[6:]))

        return outputs, gradient

    @tf.custom_gradient
    def backward(*operands: Tensor) -> tuple[Tensors, Callable[..., Any]]:
        floats = operands[:8]
        results = tuple((_dims_of(2 + i, x), x.dtype) for i, x in enumerate(floats[2:]))
        outputs = _call(_library.BACKWARD, operands, results, states)

        def gradient(*grads: Tensor) -> tuple[Any, ...]:
            # the second derivative and beyond: through the high-level implementation
            with tf.GradientTape() as tape:
                tape.watch(floats)
                found = _high_level_backward(*floats)
            second = tape.gradient(found, floats, output_gradients=list(grads))
            return (*second, *(None for _ in operands[8:]))

        return outputs, gradient

    return wkv


def _high_level_backward(
    grad_y: Tensor,  # [B, T, H, N]
    grad_final_state: Tensor,  # [B, H, N, N]
    *floats: Tensor,  # r, k, v, w, u [B, H, N], perhaps state
) -> list[Tensor]:
    r, k, v, w, u, *state = floats
    with tf.GradientTape() as tape:
        tape.watch(floats)
        outputs = chunked.wkv(r, k, v, w, u[:, None], *state)
    gradients: list[Tensor] = tape.gradient(
        outputs, floats, output_gradients=[grad_y, grad_final_state]
    )
    return gradients


def _dims_of(operand: int, x: Tensor) -> Dims:
    return tuple((operand, d) for d in range(len(x.shape)))


def _call(
    name: str, operands: Tensors, results: tuple[tuple[Dims, Any], ...], states: int
) -> Tensors:
    """One custom call as a module of its own; sizes that are not known yet are found as it runs."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    shapes = [[operands[o].shape[d] for o, d in dims] for dims, _ in results]
    types = [_type(x.shape, x.dtype) for x in operands]
    result_types = [_type(s, dtype) for s, (_, dtype) in zip(shapes, results)]
    names = [f"%a{i}" for i in range(len(operands))]
    parameters = ", ".join(f"{n}: {t}" for n, t in zip(names, types))
    lines: list[str] = []
    attributes = f"api_version = 4 : i32, backend_config = {{states = {states} : i64}}"
    if any(size is None for shape in shapes for size in shape):
        first = len(names)
        for i, (dims, _) in enumerate(results):
            lines += _shape_of(i, dims, operands, types)
            names.append(f"%shape{i}")
            types.append(f"tensor<{len(dims)}xi32>")
        indices = list(range(first, len(names)))
        attributes += f", indices_of_shape_operands = dense<{indices}> : tensor<{len(indices)}xi64>"
    out = ", ".join(result_types)
    many = len(results)
    lines += [
        f"%out:{many} = stablehlo.custom_call @{name}({', '.join(names)}) {{{attributes}}} : "
        f"({', '.join(types)}) -> ({out})",
        f"return {', '.join(f'%out#{i}' for i in range(many))} : {out}",
    ]
    body = "\n".join(lines)
    module = (
        "module @wkv attributes {jax.uses_shape_polymorphism = true} {\n"
        f"func.func public @main({parameters}) -> ({out}) {{\n{body}\n}} }}"
    )
    return tuple(
        gen_xla_ops.xla_call_module(
            args=list(operands),
            version=9,
            module=module,
            Sout=[tf.TensorShape(shape) for shape in shapes],
            Tout=[dtype for _, dtype in results],
            platforms=["CPU"],
        )
    )


def _type(shape: Any, dtype: Any) -> str:
    """The StableHLO type of a tensor."""
    names = {
        tf.float64: "f64",
        tf.float32: "f32",
        tf.bfloat16: "bf16",
        tf.float16: "f16",
        tf.int32: "i32",
    }
    sizes = "".join(f"{'?' if size is None else size}x" for size in shape)
    return f"tensor<{sizes}{names[dtype]}>"


def _shape_of(result: int, dims: Dims, operands: Tensors, types: list[str]) -> list[str]:
    """StableHLO that computes the shape of a result as %shape<result>."""
    lines, parts = [], []
    for i, (operand, dim) in enumerate(dims):
        part = f"%size{result}_{i}"
        size = operands[operand].shape[dim]
        if size is None:
            lines += [
                f"{part}_ = stablehlo.get_dimension_size %a{operand}, dim = {dim} : "
                f"({types[operand]}) -> tensor<i32>",
                f"{part} = stablehlo.reshape {part}_ : (tensor<i32>) -> tensor<1xi32>",
            ]
        else:
            lines.append(f"{part} = stablehlo.constant dense<{size}> : tensor<1xi32>")
        parts.append(part)
    each = ", ".join(["tensor<1xi32>"] * len(dims))
    lines.append(
        f"%shape{result} = stablehlo.concatenate {', '.join(parts)}, dim = 0 : "
        f"({each}) -> tensor<{len(dims)}xi32>"
    )
    return lines
