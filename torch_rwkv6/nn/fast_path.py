"""The one predicate that decides whether a fast path may replace module calls.

A fast path runs a native operator on the weights of modules without calling them. The result is the
same only if the weights are plain tensors, if calling a module does exactly what its class defines,
and if nothing observes the operations: no autograd, autocast, transform, tracing or dispatch mode.
Where the answer is False, the modules are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_rwkv6._library import has_kernels
from torch_rwkv6._torch_private import (
    dispatch_modes,
    forward_mode_active,
    global_forward_hooks,
    has_products_of,
    transforms_active,
)
from torch_rwkv6.nn.int8 import Int8Linear

__all__ = [
    "MOST_ROWS",
    "are_plain",
    "eager_inference",
    "is_traced",
    "linear",
    "product",
    "register",
    "unchanged",
]

MOST_ROWS = 8  # with more tokens at once a matrix product is faster
BLOCK = 2**19  # numbers of a weight that are converted at a time: what stays in cache

# The classes whose modules a fast path may replace, with the forward that it replaces.
_FORWARDS: dict[type[nn.Module], Any] = {}


def register(*classes: type[nn.Module]) -> None:
    """Declares that a fast path computes what the forward of these classes does."""
    _FORWARDS.update((c, c.forward) for c in classes)


register(nn.Linear, Int8Linear, nn.LayerNorm, nn.GroupNorm)


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording the operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def eager_inference(x: Tensor) -> bool:
    """Whether x is a plain CPU tensor in eager inference, with nothing observing its operations.

    Tracing is checked first, so that no guard on the size of x is recorded.
    """
    return not (
        is_traced()
        or type(x) is not Tensor
        or not x.is_cpu
        or not has_kernels
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or forward_mode_active()
        or transforms_active()
        or dispatch_modes()
        or global_forward_hooks()
    )


def unchanged(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward: no hook, patched forward or subclass.

    Parametrizations, fully_shard, LoRA and quantisation change a module's class; weight_norm and
    pruning add a hook.
    """
    own = module.__dict__
    kind = type(module)
    return (
        kind in _FORWARDS
        and kind.forward is _FORWARDS[kind]
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and own.get("_compiled_call_impl") is None  # module.compile()
    )


def are_plain(weights: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether all are dense, contiguous CPU tensors of this dtype and no subclasses of Tensor."""
    for weight in weights:
        kind = type(weight)
        if (
            (kind is not nn.Parameter and kind is not Tensor)
            or weight.dtype is not dtype
            or weight.layout is not torch.strided
            or not weight.is_cpu
            or not weight.is_contiguous()
        ):
            return False
    return True


def linear(
    module: nn.Module,  # an nn.Linear without bias, an Int8Linear, or what has taken its place
    x: Tensor,  # [..., K]
) -> Tensor:  # [..., N]
    """``module(x)``: for a few tokens by an operator that runs at memory bandwidth, for many by
    products of float32 where the CPU has none of the weight's dtype."""
    kind = type(module)
    if (
        not eager_inference(x)
        or (kind is not nn.Linear and kind is not Int8Linear)
        or not unchanged(module)
    ):
        return module(x)
    few = x.numel() <= MOST_ROWS * x.shape[-1]
    weight: Any  # a tensor, if it is plain
    scale: Any
    # Not by attribute access, which costs a microsecond each on an nn.Module.
    if kind is Int8Linear:
        weight, scale = module._buffers.get("weight"), module._buffers.get("scale")
        if not are_plain((weight,), torch.int8) or not are_plain((scale,), torch.float32):
            return module(x)
        rows = x.reshape(-1, x.shape[-1])
        if few:
            y = torch.ops.rwkv6.matvec_int8.default(rows, weight, scale)
        else:
            y = _converted_product(rows, weight, scale)
    else:
        weight = module._parameters.get("weight")
        if not are_plain((weight,), x.dtype) or module._parameters.get("bias", x) is not None:
            return module(x)
        rows = x.reshape(-1, x.shape[-1])
        if few:
            y = torch.ops.rwkv6.matvec.default(rows, weight)
        elif has_products_of(x.dtype):
            return module(x)
        else:
            y = _converted_product(rows, weight)
    return y.view(*x.shape[:-1], y.shape[1])


def product(
    x: Tensor,  # [..., M, K]
    weight: Tensor,  # [..., K, N]
) -> Tensor:  # [..., M, N]
    """``x @ weight`` for a small weight, in float32 where the CPU has no products of its dtype."""
    if not eager_inference(x) or has_products_of(x.dtype) or not are_plain((weight,), x.dtype):
        return x @ weight
    return (x.float() @ weight.float()).to(x.dtype)


def _converted_product(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    scale: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N], in the dtype of x
    """``x W^T`` in at least float32, into which the weight is converted block by block."""
    N, K = weight.shape
    step = max(1, min(N, BLOCK // K))
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    y, block = rows.new_empty(len(rows), N), rows.new_empty(step, K)
    for begin in range(0, N, step):
        part = block[: N - begin].copy_(weight[begin : begin + step])
        torch.mm(rows, part.T, out=y[:, begin : begin + step])
    return (y if scale is None else y.mul_(scale)).to(x.dtype)
