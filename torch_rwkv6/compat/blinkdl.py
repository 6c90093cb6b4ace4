"""The functions through which RWKV-LM and RWKV-PEFT call their CUDA kernels, on every device.

w is the one before its two exponentials, as for `torch_rwkv6.wkv`. States are [value, key], as in
these kernels and in a trained ``time_state``. Any length, head size and strides, and every dtype of
`torch_rwkv6.wkv`; every input gets its gradient.
"""
# ruff: noqa: N802

from __future__ import annotations

from typing import Any, overload

from torch import Tensor

from torch_rwkv6.arguments import tensor
from torch_rwkv6.compat._channels import by_channels, check_sizes

__all__ = ["RUN_CUDA_RWKV6", "RUN_CUDA_RWKV6_INFCTX", "RUN_CUDA_RWKV6_STATE"]


@overload
def RUN_CUDA_RWKV6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor: ...
@overload
def RUN_CUDA_RWKV6(
    B: int, T: int, C: int, H: int, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> Tensor: ...
def RUN_CUDA_RWKV6(*inputs: Any, **named: Any) -> Tensor:
    """The operator from a state of zeros: ``(r, k, v, w, u)`` or ``(B, T, C, H, r, k, v, w, u)``.

    Args:
        B, T, C, H: batch, tokens, channels and heads, where a call names them.
        r, k, v, w: [B, T, C], where C = H * N for any head size N.
        u: [H, N].

    Returns:
        y, [B, T, C] in r's dtype.

    Raises:
        TypeError, ValueError: as `torch_rwkv6.wkv`; also if B, T, C, H are not the tensors' sizes.
    """
    return (_plain if len(inputs) + len(named) <= 5 else _with_sizes)(*inputs, **named)


def RUN_CUDA_RWKV6_STATE(
    B: int,
    T: int,
    C: int,
    H: int,
    r: Tensor,  # [B, T, C]
    k: Tensor,  # [B, T, C]
    v: Tensor,  # [B, T, C]
    w: Tensor,  # [B, T, C]
    u: Tensor,  # [H, N]
    s: Tensor,  # [H, N, N] or [B, H, N, N], [value, key]
) -> Tensor:  # [B, T, C]
    """The operator from a given state, which gets its gradient: state tuning.

    Args:
        B, T, C, H, r, k, v, w, u: as for `RUN_CUDA_RWKV6`.
        s: initial state as [value, key]: [H, N, N] for the whole batch, or [B, H, N, N]; float32
            (float64 for float64 inputs) or r's dtype.

    Returns:
        y, [B, T, C] in r's dtype.

    Raises:
        TypeError, ValueError: as `RUN_CUDA_RWKV6`.
    """
    return RUN_CUDA_RWKV6_INFCTX(B, T, C, H, r, k, v, w, u, s)[0]


def RUN_CUDA_RWKV6_INFCTX(
    B: int,
    T: int,
    C: int,
    H: int,
    r: Tensor,  # [B, T, C]
    k: Tensor,  # [B, T, C]
    v: Tensor,  # [B, T, C]
    w: Tensor,  # [B, T, C]
    u: Tensor,  # [H, N]
    s: Tensor | None = None,  # [H, N, N] or [B, H, N, N], [value, key]
) -> tuple[Tensor, Tensor]:  # y [B, T, C], final state [B, H, N, N], [value, key]
    """The operator from a given state and with the final one: long texts in pieces.

    RWKV-PEFT has it under the name of `RUN_CUDA_RWKV6_STATE` when it trains with infctx, and
    overwrites s there. Here s stays as it is, and the final state has gradients for all inputs.

    Args:
        B, T, C, H, r, k, v, w, u, s: as for `RUN_CUDA_RWKV6_STATE`; an s of None is zeros.

    Returns:
        y, [B, T, C] in r's dtype, and the state after the last token, [B, H, N, N] as [value, key]
        in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `RUN_CUDA_RWKV6`.
    """
    check_sizes(B, T, C, H, r, u)
    initial_state = None if s is None else _key_value(s, (B, H, C // H, C // H))
    y, state = by_channels(r, k, v, w, u, initial_state)
    return y.flatten(2), state.mT


def _key_value(
    s: Tensor,  # [H, N, N] or [B, H, N, N], [value, key]
    shape: tuple[int, ...],  # B, H, N, N
) -> Tensor:  # [1 or B, H, N, N], [key, value]
    found = tuple(tensor("s", s).shape)
    if found not in (shape, shape[1:]):
        raise ValueError(
            f"s: expected [H, N, N] = {shape[1:]} or [B, H, N, N] = {shape} ([value, key]), "
            f"got shape {found}"
        )
    return (s if s.dim() == 4 else s[None]).mT


def _plain(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    y, _ = by_channels(r, k, v, w, u)
    return y.flatten(2)


def _with_sizes(
    B: int, T: int, C: int, H: int, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> Tensor:
    check_sizes(B, T, C, H, r, u)
    return _plain(r, k, v, w, u)
