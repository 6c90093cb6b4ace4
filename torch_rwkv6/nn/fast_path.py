"""Whether a fast path may stand in for modules: the one place that decides it.

A fast path runs a native operator on the weights of modules that it does not call. That is the same
thing only where the weights are plain tensors, where calling a module does what its class says and
no more, and where nobody watches the operations: no autograd, autocast, transform, trace or mode.
Whoever gets False here calls the modules.
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
    transforms_active,
)

__all__ = [
    "MOST_ROWS",
    "are_plain",
    "eager_inference",
    "is_traced",
    "linear",
    "register",
    "unchanged",
]

MOST_ROWS = 8  # with more tokens at once a matrix product is faster

# The classes whose modules a fast path may stand in for, with the forward that it stands in for.
_FORWARDS: dict[type[nn.Module], Any] = {}


def register(*classes: type[nn.Module]) -> None:
    """A fast path knows what calling these does."""
    _FORWARDS.update((c, c.forward) for c in classes)


register(nn.Linear, nn.LayerNorm, nn.GroupNorm)


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is writing down the operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def eager_inference(x: Tensor) -> bool:
    """Whether x is a plain tensor on a CPU, and its operations are run at once and by nobody else.

    Tracers are asked first, so that they see nothing of x's size.
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
    """Whether calling the module does what its class says: no hook, no other forward, no subclass.

    A parametrization, fully_shard, LoRA or quantisation gives a module another class; weight_norm
    and pruning give it a hook.
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
    """Whether all are dense tensors of this dtype in the CPU's memory, and no subclasses."""
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
    module: nn.Module,  # an nn.Linear without bias, or what has taken its place
    x: Tensor,  # [..., K]
) -> Tensor:  # [..., N]
    """``module(x)``, which on a few tokens reads the weight at the speed of the memory."""
    if (
        not eager_inference(x)
        or x.numel() > MOST_ROWS * x.shape[-1]
        or type(module) is not nn.Linear
        or not unchanged(module)
    ):
        return module(x)
    # not by attributes: nn.Module takes a microsecond for each
    weight = module._parameters.get("weight")
    if not are_plain((weight,), x.dtype) or module._parameters.get("bias", x) is not None:
        return module(x)
    rows = torch.ops.rwkv6.matvec.default(x.reshape(-1, x.shape[-1]), weight)
    return rows.view(*x.shape[:-1], rows.shape[1])
