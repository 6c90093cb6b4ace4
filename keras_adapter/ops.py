"""WKV as a function over the tensors of any Keras backend."""

from __future__ import annotations

from typing import Any

import keras

from keras_adapter import backends
from keras_adapter.checks import prepare, state_dtype

__all__ = ["wkv"]


def wkv(
    r: Any,  # [B, T, H, N]
    k: Any,  # [B, T, H, N]
    v: Any,  # [B, T, H, N]
    w: Any,  # [B, T, H, N]
    u: Any,  # [H, N]
    initial_state: Any | None = None,  # [S, H, N, N]
    *,
    state_map: Any | None = None,  # [B]
    axis_name: Any | None = None,
    high_level: bool | None = None,
) -> tuple[Any, Any]:  # y [B, T, H, N], final_state [B, H, N, N]
    r"""RWKV-6 time mixing, WKV6, over whole sequences. Differentiable where the backend is.

    For every batch row and head, with a state S of N keys by N values::

        y_t[j]  = sum_i r_t[i] * (S[i][j] + u[i] * k_t[i] * v_t[j])
        S[i][j] = exp(-exp(w_t[i])) * S[i][j] + k_t[i] * v_t[j]

    (Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
    arXiv:2404.05892, section 4.2.)

    Args:
        r: receptance, [B, T, H, N]; float64, float32, bfloat16 or float16. The head size N is 1
            to 256, T may be 0. B and T may be None while a graph is built.
        k: key, as r.
        v: value, as r.
        w: decay before its two exponentials, [B, T, H, N]; r's dtype or float32. Every value is
            allowed; w = -1e9 with k = v = 0 is padding that leaves the state as it is.
        u: bonus of the current token, [H, N]; r's dtype or float32.
        initial_state: [S, H, N, N], each state as [key, value]; float32 (float64 for float64
            inputs) or r's dtype. None is zeros. S = 1 is shared by all sequences, S = B is one
            to one, any other S needs state_map.
        state_map: [B], int32 or int64: sequence b starts from ``initial_state[state_map[b]]``.
            Repeats are allowed, their gradients add up.
        axis_name: JAX alone, inside `jax.shard_map`: the name of the mesh axis (or a tuple of
            names) over which all sequences are cut into pieces of T tokens each, the first device
            having the first ones. u and the initial state are the same on all devices of the axis;
            the final state is that after the last token of all, on all of them. States are sent,
            and no tokens. Derivatives are reverse-mode.
        high_level: True computes with keras.ops also where there is a native kernel, False by
            the native kernel where there is one, None as the environment variable ``OPS_KERNEL``
            says (1: as True). In JAX keras.ops has forward-mode derivatives (`jax.jvp`,
            `jax.jacfwd`, `jax.hessian`) as well; those of the native kernels are reverse-mode.

    Returns:
        y, [B, T, H, N] in r's dtype, and the state after the last token, [B, H, N, N], float32
        (float64 for float64 inputs). bfloat16 and float16 compute in float32; float64 does too
        in the high-level implementation on all but TensorFlow, as keras.ops does.

    Raises:
        TypeError: a dtype not named above, or an argument of another type: a state_map of floats
            or bools too.
        ValueError: a shape that does not fit, state_map without initial_state, an axis_name of no
            axis or on another backend, or values of state_map out of range. Values that are not
            known yet, inside a compiled function, are an error of the native kernels when it runs;
            where nothing can be raised (a GPU, the high-level implementation) such a sequence gets
            NaN.
    """
    compute = backends.choose(high_level, axis_name)
    given = (r, k, v, w, u, initial_state, state_map)
    if any(isinstance(x, keras.KerasTensor) for x in given):
        node = WKV(high_level, axis_name)
        return node(r, k, v, w, u, initial_state, state_map=state_map)
    return compute(*prepare(*given))


@keras.saving.register_keras_serializable(package="keras_adapter")
class WKV(keras.Operation):
    """`wkv` as a node of a Keras graph."""

    def __init__(
        self,
        high_level: bool | None = None,
        axis_name: Any | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.high_level, self.axis_name = high_level, axis_name

    def call(self, *args: Any, state_map: Any | None = None) -> tuple[Any, Any]:
        options = {"axis_name": self.axis_name, "high_level": self.high_level}
        return wkv(*args, state_map=state_map, **options)

    def compute_output_spec(
        self,
        r: Any,  # [B, T, H, N]
        k: Any,  # [B, T, H, N]
        v: Any,  # [B, T, H, N]
        w: Any,  # [B, T, H, N]
        u: Any,  # [H, N]
        initial_state: Any | None = None,  # [S, H, N, N]
        *,
        state_map: Any | None = None,  # [B]
    ) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        r, *_ = prepare(r, k, v, w, u, initial_state, state_map)
        batch, _, heads, size = r.shape
        state = keras.KerasTensor((batch, heads, size, size), dtype=state_dtype(r))
        return keras.KerasTensor(r.shape, dtype=r.dtype), state

    def get_config(self) -> dict[str, Any]:
        options = {"high_level": self.high_level, "axis_name": self.axis_name}
        return {"name": self.name, **options}
