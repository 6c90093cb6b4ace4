"""The operator under the names that Keras users of RWKV-6 know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_adapter.checks import MAX_HEAD_SIZE, state_dtype
from keras_adapter.ops import wkv

__all__ = ["RWKVKernelOperator", "get_rwkv6_kernel"]


@keras.saving.register_keras_serializable(package="keras_adapter")
class RWKVKernelOperator(keras.Operation):
    """WKV6 over (B, T, C) tensors, with the interface of rwkv6-keras-operator.

    ``operator(r, k, v, w, u, with_state=False, init_state=None, state_map=None)`` returns
    ``(y, y_state)``, y_state being None unless with_state; see `call`. It holds no state of its
    own: any number of operators, head sizes and threads share a process.

    Args:
        head_size: N, 1 to 256.
        max_sequence_length: accepted for compatibility; sequences may have any length.
        ops_loop: computes sequences of one token with keras.ops instead of the native kernel.
        name: name of the operation in a Keras graph.

    Raises:
        ValueError: head_size out of range.
    """

    def __init__(
        self,
        head_size: int,
        max_sequence_length: int | None = None,
        ops_loop: bool = False,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if not 1 <= head_size <= MAX_HEAD_SIZE:
            raise ValueError(f"head_size: expected 1 to {MAX_HEAD_SIZE}, got {head_size}")
        self.head_size = int(head_size)
        self.max_sequence_length = max_sequence_length
        self.ops_loop = bool(ops_loop)

    def call(
        self,
        r: Any,  # [B, T, C]
        k: Any,  # [B, T, C]
        v: Any,  # [B, T, C]
        w: Any,  # [B, T, C]
        u: Any,  # [H, N] or [C]
        with_state: bool = False,
        init_state: Any | None = None,  # [n_state, H, N, N] or [H, N, N]
        state_map: Any | None = None,  # [B]
    ) -> tuple[Any, Any | None]:  # y [B, T, C], y_state [B, H, N, N] or None
        """Mixes the tokens of every sequence; the mathematics is in `keras_adapter.ops.wkv`.

        Args:
            r: receptance, (B, T, C) with C = H * N; float64, float32, bfloat16 or float16.
            k: key, as r.
            v: value, as r.
            w: decay before its two exponentials, as r; float32 beside half precision too.
            u: bonus of the current token, (H, N) or (C,); r's dtype or float32.
            with_state: also return the state after the last token.
            init_state: states to start from, (n_state, H, N, N) or one (H, N, N), as [key, value];
                float32 or r's dtype. None is zeros. One state is shared by all sequences, B are
                one to one, any other number needs state_map. Used whatever with_state is.
            state_map: int32 (B,): sequence b starts from ``init_state[state_map[b]]``.

        Returns:
            y, (B, T, C) in r's dtype, and the state after the last token, (B, H, N, N) in float32
            (float64 for float64 inputs), or None without with_state.

        Raises:
            TypeError, ValueError: as `keras_adapter.ops.wkv`, and for a C that head_size does not
                divide.
        """
        r, k, v, w, u = (keras.ops.convert_to_tensor(x) for x in (r, k, v, w, u))
        heads = self._heads(r)
        tokens = (("r", r), ("k", k), ("v", v), ("w", w))
        r, k, v, w = (self._split(name, x, heads) for name, x in tokens)
        if len(u.shape) == 1 and u.shape[0] == heads * self.head_size:
            u = keras.ops.reshape(u, (heads, self.head_size))
        if init_state is not None:
            init_state = keras.ops.convert_to_tensor(init_state)
            if len(init_state.shape) == 3:
                init_state = keras.ops.expand_dims(init_state, 0)
        high_level = self.ops_loop and r.shape[1] == 1
        y, state = wkv(r, k, v, w, u, init_state, state_map=state_map, high_level=high_level)
        y = keras.ops.reshape(y, (*keras.ops.shape(y)[:2], heads * self.head_size))
        return y, (state if with_state else None)

    def compute_output_spec(
        self,
        r: Any,  # [B, T, C]
        k: Any,  # [B, T, C]
        v: Any,  # [B, T, C]
        w: Any,  # [B, T, C]
        u: Any,  # [H, N] or [C]
        with_state: bool = False,
        init_state: Any | None = None,  # [n_state, H, N, N] or [H, N, N]
        state_map: Any | None = None,  # [B]
    ) -> keras.KerasTensor | tuple[keras.KerasTensor, keras.KerasTensor]:
        batch, heads = r.shape[0], self._heads(r)
        y = keras.KerasTensor(r.shape, dtype=r.dtype)
        if not with_state:
            return y  # a Keras graph has no place for None: see symbolic_call
        shape = (batch, heads, self.head_size, self.head_size)
        return y, keras.KerasTensor(shape, dtype=state_dtype(r))

    def symbolic_call(
        self, *args: Any, **kwargs: Any
    ) -> tuple[keras.KerasTensor, keras.KerasTensor | None]:
        outputs = super().symbolic_call(*args, **kwargs)
        return outputs if isinstance(outputs, tuple) else (outputs, None)

    def _heads(self, r: Any) -> int:  # [B, T, C]
        """H, after checking the shape of r."""
        shape = tuple(r.shape)
        if len(shape) != 3:
            raise ValueError(f"r: expected 3 dimensions (B, T, C), got shape {shape}")
        if shape[2] is None or shape[2] % self.head_size:
            raise ValueError(
                f"r: expected a width C that head_size = {self.head_size} divides, got {shape[2]}"
            )
        return int(shape[2]) // self.head_size

    def _split(self, name: str, x: Any, heads: int) -> Any:  # [B, T, C] -> [B, T, H, N]
        shape, width = tuple(x.shape), heads * self.head_size
        if len(shape) != 3 or shape[2] != width:
            raise ValueError(f"{name}: expected the shape of r, (B, T, {width}), got shape {shape}")
        return keras.ops.reshape(x, (*keras.ops.shape(x)[:2], heads, self.head_size))

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "head_size": self.head_size,
            "max_sequence_length": self.max_sequence_length,
            "ops_loop": self.ops_loop,
        }


KERNEL_TYPES = ("native", "cuda", "triton")


def get_rwkv6_kernel(
    HEAD_SIZE: int = 64,
    KERNEL_TYPE: str = "native",
    MAX_SEQUENCE_LENGTH: int | None = 4096,
) -> Callable[..., Any]:
    """The operator with the interface of rwkv-ops.

    Args:
        HEAD_SIZE: N, 1 to 256.
        KERNEL_TYPE: "native", "cuda" or "triton", for compatibility: what computes is chosen by
            where the tensors are (``OPS_KERNEL=1`` forces the high-level implementation).
        MAX_SEQUENCE_LENGTH: accepted for compatibility; sequences may have any length.

    Returns:
        ``op(r, k, v, w, u, initial_state=None, output_final_state=False, state_map=None)``: y, or
        (y, final_state) with output_final_state. Shapes, dtypes and errors are those of
        `RWKVKernelOperator`.

    Raises:
        ValueError: an unknown KERNEL_TYPE, or HEAD_SIZE out of range.
    """
    if KERNEL_TYPE not in KERNEL_TYPES:
        raise ValueError(
            f"KERNEL_TYPE: expected one of {', '.join(KERNEL_TYPES)}, got {KERNEL_TYPE!r}"
        )
    operator = RWKVKernelOperator(HEAD_SIZE, MAX_SEQUENCE_LENGTH)

    def rwkv6_op(
        r: Any,  # [B, T, C]
        k: Any,  # [B, T, C]
        v: Any,  # [B, T, C]
        w: Any,  # [B, T, C]
        u: Any,  # [H, N] or [C]
        initial_state: Any | None = None,  # [n_state, H, N, N] or [H, N, N]
        output_final_state: bool = False,
        state_map: Any | None = None,  # [B]
    ) -> Any:
        y, state = operator(
            r,
            k,
            v,
            w,
            u,
            with_state=output_final_state,
            init_state=initial_state,
            state_map=state_map,
        )
        return (y, state) if output_final_state else y

    return rwkv6_op
