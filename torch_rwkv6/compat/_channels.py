"""Tensors of [B, T, C], whose heads most programs leave to their kernels to find."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_rwkv6.arguments import tensor
from torch_rwkv6.ops import wkv

__all__ = ["by_channels", "check_sizes"]


def by_channels(
    r: Tensor,  # [B, T, C]
    k: Tensor,  # [B, T, C]
    v: Tensor,  # [B, T, C]
    w: Tensor,  # [B, T, C]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [1 or B, H, N, N]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B, H, N, N]
    """`torch_rwkv6.wkv` for r, k, v, w of [B, T, C]; u says how many heads C has.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: an argument of the wrong shape.
    """
    H, N = _shape("u", u, 2, "[H, N]")
    r, k, v, w = (_heads(name, x, H, N) for name, x in zip("rkvw", (r, k, v, w)))
    return wkv(r, k, v, w, u, initial_state)


def check_sizes(B: int, T: int, C: int, H: int, r: Tensor, u: Tensor) -> None:
    """Checks the sizes that a call names, which its tensors have as well.

    Raises:
        TypeError: r or u is no tensor.
        ValueError: they have other sizes.
    """
    for names, sizes, found, of in (
        ("B, T, C", (B, T, C), _shape("r", r, 3, "[B, T, C]"), "r"),
        ("H, C // H", (H, C // H if H else 0), _shape("u", u, 2, "[H, N]"), "u"),
    ):
        if sizes != found:
            raise ValueError(f"{names}: expected the shape of {of} = {found}, got {sizes}")


def _heads(name: str, value: Any, H: int, N: int) -> Tensor:
    """A tensor of [B, T, C] as [B, T, H, N]."""
    shape = _shape(name, value, 3, "[B, T, C]")
    if shape[2] != H * N:
        raise ValueError(
            f"{name}: expected C = H * N = {H} * {N} channels for u of [H, N], got shape {shape}"
        )
    return value.unflatten(2, (H, N))


def _shape(name: str, value: Any, dims: int, axes: str) -> tuple[int, ...]:
    """The shape of a tensor that must have `dims` axes."""
    shape = tuple(tensor(name, value).shape)
    if len(shape) != dims:
        raise ValueError(f"{name}: expected {dims} dimensions {axes}, got shape {shape}")
    return shape
