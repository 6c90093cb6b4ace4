"""The operators as Python functions, whose errors name the wrong argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_rwkv6.checks import check, explain
from torch_rwkv6.contract import WKV, WKV4, WKV4_UPDATE, WKV_UPDATE, Operator
from torch_rwkv6.registration.autocast import DEVICE_KEYS

__all__ = ["wkv", "wkv4", "wkv4_update", "wkv_update"]

# Looked up once, not in every call.
_wkv, _wkv_update = WKV.overload, WKV_UPDATE.overload
_wkv4, _wkv4_update = WKV4.overload, WKV4_UPDATE.overload


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [S, H, N, N]
    *,
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B or M, H, N, N]
    r"""RWKV-6 time mixing, WKV6, over whole sequences. Differentiable.

    For every batch row and head, with a state S of N keys by N values::

        y_t[j]  = sum_i r_t[i] * (S[i][j] + u[i] * k_t[i] * v_t[j])
        S[i][j] = exp(-exp(w_t[i])) * S[i][j] + k_t[i] * v_t[j]

    (Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence",
    arXiv:2404.05892, section 4.2.)

    Args:
        r: receptance, [B, T, H, N]; float64, float32, bfloat16 or float16. The head size N is 1
            to 256, T may be 0. Any strides; a view with a contiguous last dimension, such as
            ``x.view(B, T, H, N)`` or a slice of a fused projection, is read in place.
        k: key, as r.
        v: value, as r.
        w: decay before its two exponentials, [B, T, H, N]; r's dtype or float32. Every value is
            allowed, infinities included; w = -1e9 with k = v = 0 is padding that leaves the
            state as it is.
        u: bonus of the current token, [H, N]; r's dtype or float32.
        initial_state: [S, H, N, N], each state as [key, value]; float32 (float64 for float64
            inputs) or r's dtype. None is zeros. S = 1 is shared by all sequences, S = B is one
            to one, any other S needs state_map.
        state_map: [B], int32 or int64: sequence b starts from ``initial_state[state_map[b]]``.
            Repeats are allowed, their gradients add up.
        cu_seqlens: [M + 1], int32 or int64: B must be 1 and its T tokens are M sequences packed
            one after the other, sequence m being tokens ``cu_seqlens[m]`` to
            ``cu_seqlens[m + 1]``. M then takes B's place in the state shapes and in state_map.

    Returns:
        y, [B, T, H, N] in r's dtype, and the state after the last token, [B or M, H, N, N],
        float32 (float64 for float64 inputs). bfloat16 and float16 compute in float32.

    Raises:
        TypeError: an argument is no tensor or of a dtype not named above.
        ValueError: a shape or device that does not fit, or state_map without initial_state.
        RuntimeError: state_map or cu_seqlens hold values out of range. (On a GPU, where reading
            them would stall the stream, such a sequence gets NaN instead.)
    """
    arguments = (r, k, v, w, u, initial_state, state_map, cu_seqlens)
    return _call(WKV, _wkv, arguments)


def wkv_update(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [S, H, N, N]
    *,
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> Tensor:  # [B, T, H, N]
    """As `wkv`, but reads and updates ``state`` in place: decoding, prefill in pieces, state pools.

    For inference only: there is no derivative.

    Args:
        r, k, v, w, u, cu_seqlens: as for `wkv`.
        state: [S, H, N, N] as [key, value]; float32 (float64 for float64 inputs), with a
            contiguous last dimension. Without state_map, S is the number of sequences.
        state_map: [B] (or [M] with cu_seqlens), int32 or int64: sequence b reads and writes row
            ``state_map[b]``. The rows must be distinct. A negative entry marks a padding row of
            a fixed-size batch: its y is zero and no state is touched.

    Returns:
        y, [B, T, H, N], in r's dtype.

    Raises:
        TypeError, ValueError: as for `wkv`; state is then unchanged.
        RuntimeError: values out of range, repeated rows, or a call that autograd would have to
            record; state is then unchanged.
    """
    arguments = (r, k, v, w, u, state, state_map, cu_seqlens)
    return _call(WKV_UPDATE, _wkv_update, arguments)


def wkv4(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None = None,  # [B, 3, D]
) -> tuple[Tensor, Tensor]:  # y [B, T, D], final_state [B, 3, D]
    r"""RWKV-4 time mixing over whole sequences, channel by channel. Differentiable.

    For every batch row and channel, the average of the values so far, weighted by e^k and decayed
    by exp(-exp(w)) per token::

        y_t = (num + exp(u + k_t) * v_t) / (den + exp(u + k_t))
        num = exp(-exp(w)) * num + exp(k_t) * v_t
        den = exp(-exp(w)) * den + exp(k_t)

    (Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048,
    section 3.) num and den are kept as a = num / e^p and b = den / e^p, where p is the largest
    exponent so far: nothing overflows, whatever the keys are.

    Args:
        k: key, [B, T, D]; float64, float32, bfloat16 or float16. T may be 0.
        v: value, as k.
        w: decay before its two exponentials, [D]; k's dtype or float32 (an official
            ``time_decay``).
        u: bonus that is added to the key of the current token, [D]; k's dtype or float32
            (``time_first``).
        initial_state: a, b and p after the previous tokens, [B, 3, D], float32 (float64 for float64
            inputs); None is the start: a = b = 0, p = -1e30.

    Returns:
        y, [B, T, D], in k's dtype, and final_state, [B, 3, D].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    return _call(WKV4, _wkv4, (k, v, w, u, initial_state))


def wkv4_update(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    state: Tensor,  # [B, 3, D]
) -> Tensor:  # [B, T, D]
    """As `wkv4`, but reads and updates ``state`` in place. For inference only: no derivative.

    Args:
        k, v, w, u: as for `wkv4`.
        state: [B, 3, D], float32 (float64 for float64 inputs), with a contiguous last dimension.

    Returns:
        y, [B, T, D], in k's dtype.

    Raises:
        TypeError, ValueError: as for `wkv4`; state is then unchanged.
        RuntimeError: a call that autograd would have to record; state is then unchanged.
    """
    return _call(WKV4_UPDATE, _wkv4_update, (k, v, w, u, state))


def _call(operator: Operator, op: Any, arguments: tuple[Tensor | None, ...]) -> Any:
    """The results of `op`, or an error that names the argument.

    Where autocast has a rule for the operator, that rule checks the arguments after casting them.
    """
    if torch.compiler.is_compiling():  # only shapes are known, and checks add no code to the graph
        if not _autocast_casts(operator, arguments[0]):
            check(operator, arguments)
        return op(*arguments)
    try:
        return op(*arguments)
    except Exception:
        if not _autocast_casts(operator, arguments[0]):
            explain(operator, arguments)
        raise


def _autocast_casts(operator: Operator, first: Tensor | None) -> bool:
    if not operator.autocast or not isinstance(first, Tensor):
        return False
    return first.device.type in DEVICE_KEYS and torch.is_autocast_enabled(first.device.type)
