"""The operators in ONNX's own: what ``torch.onnx.export(..., dynamo=True)`` needs to write a model.

It needs the packages onnx and onnxscript (``pip install torch_rwkv6[onnx]``)::

    from torch_rwkv6.onnx import TRANSLATIONS

    torch.onnx.export(model, (tokens,), "model.onnx", dynamo=True,
                      custom_translation_table=TRANSLATIONS)

A recurrence becomes a Scan over the tokens, which any runtime of ONNX has: no library of ours runs
there. The maths is that of `torch_rwkv6.reference` and `torch_rwkv6.reference4`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    from onnxscript import graph, ir, script
    from onnxscript import opset18 as op  # the oldest that torch.onnx writes
    from onnxscript.onnx_types import TensorType
    from onnxscript.values import Opset
except ImportError as error:
    raise ImportError(
        "torch_rwkv6.onnx: the packages onnx and onnxscript are missing: "
        "pip install torch_rwkv6[onnx]"
    ) from error

from torch_rwkv6.reference4 import START

__all__ = ["TRANSLATIONS"]

_own = Opset("torch_rwkv6", 1)  # its functions are inlined: nothing of it is left in a model


@script(_own, default_opset=op)
def _recurrence(
    r: TensorType,  # [T, B, H, N]
    k: TensorType,  # [T, B, H, N]
    v: TensorType,  # [T, B, H, N]
    w: TensorType,  # [T, B, H, N]
    u: TensorType,  # [H, N]
    initial_state: TensorType,  # [B, H, N, N]
) -> tuple[TensorType, TensorType]:  # y [T, B, H, N], final state [B, H, N, N]
    log_decay = op.Neg(op.Exp(w))
    decay = op.Exp(log_decay)
    # The rounding error of a decay near 1, as in torch_rwkv6.reference. ONNX has no expm1: this is
    # Kahan's, (e^x - 1) x / log(e^x), in which the error of e^x cancels.
    one = op.CastLike(1.0, w)
    expm1 = op.Where(decay == one, log_decay, (decay - one) * log_decay / op.Log(decay))
    lost = op.Where(decay > op.CastLike(0.5, w), expm1 - (decay - one), op.CastLike(0.0, w))
    row = op.Constant(value_ints=[-2])
    column = op.Constant(value_ints=[-1])

    # Without a return type, which onnxscript would take for that of the whole function.
    @graph()
    def token(  # type: ignore[no-untyped-def]
        state: TensorType,  # [B, H, N, N]
        r_t: TensorType,  # [B, H, 1, N]
        k_t: TensorType,  # [B, H, N, 1]
        v_t: TensorType,  # [B, H, 1, N]
        decay_t: TensorType,  # [B, H, N, 1]
        lost_t: TensorType,  # [B, H, N, 1]
    ):
        y_t = op.MatMul(r_t, state)  # [B, H, 1, N]
        new_state = decay_t * state + (lost_t * state + k_t * v_t)
        return new_state, y_t

    final_state, past = op.Scan(
        initial_state,
        op.Unsqueeze(r, row),
        op.Unsqueeze(k, column),
        op.Unsqueeze(v, row),
        op.Unsqueeze(decay, column),
        op.Unsqueeze(lost, column),
        body=token,
        num_scan_inputs=5,
    )
    present = op.ReduceSum(r * u * k, column, keepdims=1) * v
    return op.Squeeze(past, row) + present, final_state


@script(_own, default_opset=op)
def _recurrence4(
    k: TensorType,  # [T, B, D]
    v: TensorType,  # [T, B, D]
    w: TensorType,  # [D]
    u: TensorType,  # [D]
    initial_state: TensorType,  # [B, 3, D]
) -> tuple[TensorType, TensorType]:  # y [T, B, D], final state [B, 3, D]
    log_decay = op.Neg(op.Exp(w))
    axis = op.Constant(value_ints=[2])

    @graph()
    def token(  # type: ignore[no-untyped-def]
        a: TensorType,  # [B, 1, D]
        b: TensorType,  # [B, 1, D]
        p: TensorType,  # [B, 1, D]
        k_t: TensorType,  # [B, 1, D]
        v_t: TensorType,  # [B, 1, D]
    ):
        present = u + k_t
        q = op.Max(p, present)
        old = op.Exp(p - q)
        new = op.Exp(present - q)
        y_t = (old * a + new * v_t) / (old * b + new)
        q = op.Max(p + log_decay, k_t)
        old = op.Exp(p + log_decay - q)
        new = op.Exp(k_t - q)
        return old * a + new * v_t, old * b + new, op.Identity(q), y_t

    a_0, b_0, p_0 = op.Split(initial_state, axis=1, num_outputs=3)
    a_T, b_T, p_T, y = op.Scan(
        a_0,
        b_0,
        p_0,
        op.Unsqueeze(k, axis),
        op.Unsqueeze(v, axis),
        body=token,
        num_scan_inputs=2,
    )
    return op.Squeeze(y, axis), op.Concat(a_T, b_T, p_T, axis=1)


def _state_dtype(x: Any) -> Any:
    """`torch_rwkv6.contract.state_dtype` of a tensor in ONNX."""
    return x.dtype if x.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def _wkv(
    r: TensorType,  # [B, T, H, N]
    k: TensorType,  # [B, T, H, N]
    v: TensorType,  # [B, T, H, N]
    w: TensorType,  # [B, T, H, N]
    u: TensorType,  # [H, N]
    initial_state: TensorType = None,  # [1 or B, H, N, N]
    state_map: TensorType = None,
    cu_seqlens: TensorType = None,
) -> Any:  # y [B, T, H, N], final state [B, H, N, N]
    """`torch_rwkv6.wkv`."""
    for name, value in (("state_map", state_map), ("cu_seqlens", cu_seqlens)):
        if value is not None:
            raise NotImplementedError(
                f"{name}: expected None where a model is written as ONNX, got a tensor"
            )
    dtype = _state_dtype(r)
    B, H, N = (op.Shape(r, start=i, end=i + 1) for i in (0, 2, 3))
    state = op.Constant(value_float=0.0) if initial_state is None else initial_state
    state = op.Expand(op.Cast(state, to=dtype), op.Concat(B, H, N, N, axis=0))
    tokens_first = (op.Transpose(op.Cast(x, to=dtype), perm=[1, 0, 2, 3]) for x in (r, k, v, w))
    y, final_state = _recurrence(*tokens_first, op.Cast(u, to=dtype), state)
    return op.CastLike(op.Transpose(y, perm=[1, 0, 2, 3]), r), final_state


def _wkv4(
    k: TensorType,  # [B, T, D]
    v: TensorType,  # [B, T, D]
    w: TensorType,  # [D]
    u: TensorType,  # [D]
    initial_state: TensorType = None,  # [B, 3, D]
) -> Any:  # y [B, T, D], final state [B, 3, D]
    """`torch_rwkv6.wkv4`."""
    dtype = _state_dtype(k)
    if initial_state is None:
        B, D = (op.Shape(k, start=i, end=i + 1) for i in (0, 2))
        start = op.Constant(value=ir.tensor([[0.0], [0.0], [START]]))  # [3, 1]
        shape = op.Concat(B, op.Constant(value_ints=[3]), D, axis=0)
        initial_state = op.Expand(op.Cast(start, to=dtype), shape)
    tokens_first = (op.Transpose(op.Cast(x, to=dtype), perm=[1, 0, 2]) for x in (k, v))
    vectors = (op.Cast(x, to=dtype) for x in (w, u))
    y, final_state = _recurrence4(*tokens_first, *vectors, initial_state)
    return op.CastLike(op.Transpose(y, perm=[1, 0, 2]), k), final_state


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.rwkv6.wkv.default: _wkv,
    torch.ops.rwkv6.wkv4.default: _wkv4,
}
"""For the argument ``custom_translation_table`` of torch.onnx.export."""
