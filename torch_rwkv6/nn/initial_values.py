"""The official initial values: what they depend on, and how they get into parameters.

Every module sets its own in ``reset_parameters``. So do the PyTorch layers inside them, so that a
model built on the meta device can be initialised module by module, in any order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_rwkv6.arguments import integer
from torch_rwkv6.nn.sharded import device_of, write

__all__ = ["channels", "fill", "initialise", "position", "with_initial_weight"]


def position(layer_id: int, n_layer: int) -> tuple[float, float]:
    """depth, from 0 for the first layer to 1 for the last; height, from 1 to almost 0.

    Depth is 0 where there is only one layer (the official formula would divide by zero).

    Raises:
        TypeError: no integers.
        ValueError: layer_id is not below n_layer.
    """
    n_layer = integer("n_layer", n_layer, 1)
    layer_id = integer("layer_id", layer_id, 0, n_layer - 1)
    return layer_id / max(n_layer - 1, 1), 1 - layer_id / n_layer


def channels(n_embd: int) -> tuple[Tensor, Tensor, Tensor]:  # [D] each
    """n / D and n / (D - 1) of the channels n = 0 to D - 1, and the zigzag (n + 1) % 3 - 1.

    In float64 on the CPU, whatever the defaults are: `fill` rounds them.
    """
    n = torch.arange(n_embd, dtype=torch.float64, device="cpu")
    return n / n_embd, n / max(n_embd - 1, 1), (n + 1) % 3 - 1


def fill(
    parameter: Tensor,  # any shape
    value: Tensor,  # as many elements
) -> None:
    """Writes a value to a parameter of any dtype and device, sharded ones included."""
    if not parameter.is_meta:
        write(parameter, value.view(parameter.shape))


@torch.no_grad()
def initialise(
    parameter: Tensor,  # any shape
    init: Callable[..., Any],
    **options: float,
) -> None:
    """Fills a parameter by a function of torch.nn.init, which need not know its dtype or sharding.

    Args:
        init: such as ``nn.init.orthogonal_``; it runs on a plain tensor of at least 32 bits.
        options: of ``init``.
    """
    if parameter.is_meta:
        return
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    value = torch.empty(parameter.shape, dtype=dtype, device=device_of(parameter))
    init(value, **options)
    fill(parameter, value)


def with_initial_weight(
    module: nn.Module, init: Callable[..., Any], **options: float
) -> Any:  # the module
    """Makes ``module.reset_parameters()`` fill the weight by ``init``, and a bias with zeros.

    The module keeps its class, because quantisation selects modules by class.
    """
    module.reset_parameters = _Reset(module, init, options)  # type: ignore[assignment]
    return module


class _Reset:
    """``reset_parameters`` of one module.

    It holds a weak reference to its module: a reference cycle would keep a deleted model alive
    until the garbage collector runs.
    """

    def __init__(
        self, module: nn.Module, init: Callable[..., Any], options: dict[str, float]
    ) -> None:
        self.module, self.init, self.options = weakref.ref(module), init, options

    def __call__(self) -> None:
        module = self.module()
        assert module is not None  # whoever calls this has it
        initialise(module.weight, self.init, **self.options)  # type: ignore[arg-type]
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:  # pickle and deepcopy put the copy of the module here
        return _Reset, (self.module(), self.init, self.options)
