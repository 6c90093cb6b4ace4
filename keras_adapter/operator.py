"""The operator under the names that Keras users of RWKV-6 know."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras

from keras_adapter.checks import MAX_HEAD_SIZE, flag, number, prepare, state_dtype, tensor
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
        high_level: True computes everything with keras.ops, False by the native kernel where there
            is one, None as the environment variable ``OPS_KERNEL`` says.
        name: name of the operation in a Keras graph.

    Raises:
        TypeError: head_size or max_sequence_length not an int, ops_loop or high_level not a bool.
        ValueError: head_size or max_sequence_length out of range.
    """

    def __init__(
        self,
        head_size: int,
        max_sequence_length: int | None = None,
        ops_loop: bool = False,
        *,
        high_level: bool | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.head_size = number("head_size", head_size, MAX_HEAD_SIZE)
        self.max_sequence_length: int | None = None
        if max_sequence_length is not None:
            self.max_sequence_length = number("max_sequence_length", max_sequence_length)
        self.ops_loop = flag("ops_loop", ops_loop)
        self.high_level = None if high_level is None else flag("high_level", high_level)

    def call(
        self,
        r: Any,  # [B, T, C]
        k: Any,  # [B, T, C]
        v: Any,  # [B, T, C]
        w: Any,  # [B, T, C]
        u: Any,  # [H, N], [C] or [1, C]
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
            u: bonus of the current token, (H, N), (C,) or another shape of C elements, as (1, C);
                r's dtype or float32.
            with_state: also return the state after the last token.
            init_state: states to start from, (n_state, H, N, N) or one (H, N, N), as [key, value];
                float32 or r's dtype. None is zeros. One state is shared by all sequences, B are
                one to one, any other number needs state_map. Used whatever with_state is.
            state_map: int32 or int64 (B,): sequence b starts from ``init_state[state_map[b]]``.

        Returns:
            y, (B, T, C) in r's dtype, and the state after the last token, (B, H, N, N) in float32
            (float64 for float64 inputs), or None without with_state.

        Raises:
            TypeError, ValueError: as `keras_adapter.ops.wkv`, and for a C that head_size does not
                divide or a with_state that is no bool.
        """
        with_state = flag("with_state", with_state)
        r, k, v, w, u, init_state = self._by_heads(r, k, v, w, u, init_state)
        high_level = True if self.ops_loop and r.shape[1] == 1 else self.high_level
        y, state = wkv(r, k, v, w, u, init_state, state_map=state_map, high_level=high_level)
        y = keras.ops.reshape(y, (*keras.ops.shape(y)[:2], y.shape[2] * y.shape[3]))
        return y, (state if with_state else None)

    def compute_output_spec(
        self,
        r: Any,  # [B, T, C]
        k: Any,  # [B, T, C]
        v: Any,  # [B, T, C]
        w: Any,  # [B, T, C]
        u: Any,  # [H, N], [C] or [1, C]
        with_state: bool = False,
        init_state: Any | None = None,  # [n_state, H, N, N] or [H, N, N]
        state_map: Any | None = None,  # [B]
    ) -> keras.KerasTensor | tuple[keras.KerasTensor, keras.KerasTensor]:
        with_state = flag("with_state", with_state)
        r, k, v, w, u, init_state = self._by_heads(r, k, v, w, u, init_state)
        prepare(r, k, v, w, u, init_state, state_map)
        batch, tokens, heads, size = r.shape
        y = keras.KerasTensor((batch, tokens, heads * size), dtype=r.dtype)
        if not with_state:
            return y  # a Keras graph has no place for None: see symbolic_call
        return y, keras.KerasTensor((batch, heads, size, size), dtype=state_dtype(r))

    def symbolic_call(
        self, *args: Any, **kwargs: Any
    ) -> tuple[keras.KerasTensor, keras.KerasTensor | None]:
        outputs = super().symbolic_call(*args, **kwargs)
        return outputs if isinstance(outputs, tuple) else (outputs, None)

    def _by_heads(
        self,
        r: Any,  # [B, T, C]
        k: Any,  # [B, T, C]
        v: Any,  # [B, T, C]
        w: Any,  # [B, T, C]
        u: Any,  # [H, N], [C] or [1, C]
        init_state: Any | None,  # [n_state, H, N, N] or [H, N, N]
    ) -> tuple[Any, ...]:  # as `keras_adapter.ops.wkv` has them
        r = tensor("r", r)
        shape = tuple(r.shape)
        if len(shape) != 3:
            raise ValueError(f"r: expected 3 dimensions (B, T, C), got shape {shape}")
        width, size = shape[2], self.head_size
        if not width or width % size:
            raise ValueError(f"r: expected a width C that head_size = {size} divides, got {width}")
        heads = width // size

        def split(name: str, x: Any) -> Any:  # [B, T, C] -> [B, T, H, N]
            x = tensor(name, x)
            found = tuple(x.shape)
            if len(found) != 3 or found[2] != width:
                raise ValueError(
                    f"{name}: expected the shape of r, (B, T, {width}), got shape {found}"
                )
            return _reshape(x, (*found[:2], heads, size))

        u = tensor("u", u)
        found = tuple(u.shape)
        transposed = len(found) == 2 and found == (size, heads)
        if None not in found and math.prod(found) == width and not transposed:
            u = _reshape(u, (heads, size))
        if init_state is not None:
            init_state = tensor("init_state", init_state)
            if len(init_state.shape) == 3:
                init_state = _reshape(init_state, (1, *init_state.shape))
        return (*(split(n, x) for n, x in (("r", r), ("k", k), ("v", v), ("w", w))), u, init_state)

    def get_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "head_size": self.head_size,
            "max_sequence_length": self.max_sequence_length,
            "ops_loop": self.ops_loop,
            "high_level": self.high_level,
        }


def _reshape(x: Any, shape: tuple[Any, ...]) -> Any:
    """x in another shape of as many elements; sizes that are not known yet stay where they are."""
    if isinstance(x, keras.KerasTensor):  # its shape is all there is: no operation of the graph
        return keras.KerasTensor(shape, dtype=x.dtype)
    known = keras.ops.shape(x)
    return keras.ops.reshape(x, [known[i] if n is None else n for i, n in enumerate(shape)])


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
        TypeError: HEAD_SIZE or MAX_SEQUENCE_LENGTH not an int.
        ValueError: an unknown KERNEL_TYPE, or HEAD_SIZE or MAX_SEQUENCE_LENGTH out of range.
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
        u: Any,  # [H, N], [C] or [1, C]
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
            with_state=flag("output_final_state", output_final_state),
            init_state=initial_state,
            state_map=state_map,
        )
        return (y, state) if output_final_state else y

    return rwkv6_op
