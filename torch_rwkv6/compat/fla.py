"""`fla.ops.rwkv6` of flash-linear-attention 0.6.0 (fla-core), on every device.

Here w is the log decay, at most 0: that of `torch_rwkv6.wkv` is log(-w). Outputs are scaled, by
K^-0.5 unless told otherwise: RWKV-6 itself has a scale of 1. States are [N, H, K, V], which is
[key, value] as everywhere in torch_rwkv6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_rwkv6.arguments import number, tensor
from torch_rwkv6.ops import wkv

__all__ = ["chunk_rwkv6", "fused_recurrent_rwkv6"]


def chunk_rwkv6(
    r: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V = K]
    w: Tensor,  # [B, T, H, K]
    u: Tensor,  # [H, K]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
    cu_seqlens_cpu: Tensor | None = None,  # [N + 1]
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # y [B, T, H, V], final_state [N, H, K, V]
    """`torch_rwkv6.wkv` with the arguments of fla's ``chunk_rwkv6``.

    With ``w = -torch.exp(raw_w)`` and a scale of 1 it is RWKV-6.

    Args:
        r, k, v, u: as for `torch_rwkv6.wkv`; values have the size of keys.
        w: log decay, [B, T, H, K] of any floating dtype: a token multiplies the state by exp(w).
            All from -inf, which forgets everything, to 0, which forgets nothing, is allowed and has
            its gradient. A positive w is no decay: that key of the state becomes NaN, because
            nothing waits to look at the values. ``-torch.exp(raw_w)`` and ``logsigmoid`` give none.
        scale: factor of r, and so of y; None is K^-0.5.
        initial_state: [N, H, K, V], float32 (float64 for float64 inputs) or r's dtype; None is
            zeros. N is B or the number of packed sequences; a single state is shared by all.
        output_final_state: whether to return the final state.
        cu_seqlens: [N + 1], as for `torch_rwkv6.wkv`; B is 1 then.
        cu_seqlens_cpu: has no effect, because nothing waits for the values of cu_seqlens.
        kwargs: ``chunk_size``, which has no effect.

    Returns:
        y, [B, T, H, V] in r's dtype, and the final state, [N, H, K, V] in float32 (float64 for
        float64 inputs), or None.

    Raises:
        TypeError, ValueError, RuntimeError: as `torch_rwkv6.wkv`; also for ``head_first`` and other
            arguments that fla 0.6.0 does not have.
    """
    if "head_first" in kwargs:
        raise TypeError(
            "head_first: no longer an argument, as in fla 0.6; tensors are [B, T, H, K], which "
            "x.transpose(1, 2) makes of [B, H, T, K]"
        )
    unknown = sorted(kwargs.keys() - {"chunk_size"})
    if unknown:
        raise TypeError(f"{unknown[0]}: chunk_rwkv6 has no such argument")
    return fused_recurrent_rwkv6(
        r, k, v, w, u, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_recurrent_rwkv6(
    r: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V = K]
    w: Tensor,  # [B, T, H, K]
    u: Tensor,  # [H, K]
    scale: float | None = None,
    initial_state: Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1]
) -> tuple[Tensor, Tensor | None]:  # y [B, T, H, V], final_state [N, H, K, V]
    """As `chunk_rwkv6`, by the same kernels, and in both directions.

    Args:
        r, k, v, w, u, scale, initial_state, output_final_state, cu_seqlens: as for `chunk_rwkv6`.
        reverse: walk from the last token of each sequence to its first. The initial state is then
            the one before the last token, the final state the one after the first.

    Returns:
        As `chunk_rwkv6`.

    Raises:
        TypeError, ValueError, RuntimeError: as `torch_rwkv6.wkv`.
    """
    r, k, v, w = (tensor(name, x) for name, x in zip("rkvw", (r, k, v, w)))
    packed = cu_seqlens is not None
    scale = r.shape[-1] ** -0.5 if scale is None else number("scale", scale)
    if scale != 1:
        r = r * scale
    if reverse:
        r, k, v, w = (x.flip(1) for x in (r, k, v, w))
        if packed:  # turned as a whole, which turns the order of the sequences as well
            cu_seqlens = r.shape[1] - tensor("cu_seqlens", cu_seqlens).flip(0)
            if initial_state is not None:
                initial_state = tensor("initial_state", initial_state).flip(0)
    y, state = wkv(r, k, v, _raw(w), u, initial_state, cu_seqlens=cu_seqlens)
    if reverse:
        y, state = y.flip(1), state.flip(0) if packed else state
    return y, state if output_final_state else None


def _raw(w: Tensor) -> Tensor:
    """w before its two exponentials, log(-w), in float32 or float64. w, result: [...].

    The gradient of a log decay is the operator's, which has the factor w, times the derivative of
    log(-w), which is 1 / w: at w = 0 that is 0 * inf. So w is lowered by so little that no decay
    changes; then the two factors cancel everywhere.
    """
    w = w if w.dtype == torch.float64 else w.float()
    return torch.log(torch.finfo(w.dtype).eps ** 2 - w)
