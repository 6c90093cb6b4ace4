"""What differs between the backends' ways to differentiate and compile, in one place."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import ml_dtypes
import numpy as np

BACKEND = keras.backend.backend()
DIFFERENTIABLE = BACKEND in ("torch", "jax", "tensorflow")


def tensor(x, dtype=None):
    """A tensor of the backend; dtype bfloat16 included."""
    if x is None:
        return None
    x = np.asarray(x)
    if x.dtype == ml_dtypes.bfloat16:
        return keras.ops.cast(keras.ops.convert_to_tensor(x.astype("float32")), "bfloat16")
    return keras.ops.convert_to_tensor(x, dtype=dtype or str(x.dtype))


def array(x):
    """As NumPy, bfloat16 as ml_dtypes'."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    if dtype == "bfloat16":
        x = keras.ops.cast(x, "float32")
    x = np.asarray(keras.ops.convert_to_numpy(x))
    return x.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else x


def gradients(function, inputs, grad_outputs):
    """(outputs, gradients of the inputs) of function(*inputs), for the given output gradients."""
    if BACKEND == "jax":
        return _jax_vjp(function)(tuple(inputs), tuple(grad_outputs))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
        return outputs, tape.gradient(outputs, inputs, output_gradients=list(grad_outputs))
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    return outputs, torch.autograd.grad(outputs, leaves, list(grad_outputs))


@functools.cache  # a function that comes again is compiled for new shapes only
def _jax_vjp(function):
    import jax

    @jax.jit
    def run(inputs, grad_outputs):
        outputs, vjp = jax.vjp(function, *inputs)
        return outputs, vjp(grad_outputs)

    return run


@functools.cache
def quick(function):
    """function as it runs soonest: JAX takes long for its first operations one by one."""
    return compiled(function) if BACKEND == "jax" else function


def traced(function):
    """function as it runs soonest many times over with the same shapes."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return quick(function)


def compiled(function):
    """function as the backend compiles it."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if BACKEND == "torch":
        import torch

        return torch.compile(function, fullgraph=True, backend="aot_eager")
    return function


def relative_rms(found, expected):
    found, expected = np.asarray(found).astype("float64"), np.asarray(expected).astype("float64")
    size = np.linalg.norm(expected)
    difference = np.linalg.norm(found - expected)
    return difference / size if size else difference
