"""Mixed precision: r, k, v go to the autocast dtype; w, u and the state stay float32.

The decay exp(-exp(w)) acts on the state once per token: rounded to 8 bits it would change what a
model remembers. `wkv_backward` needs no rule, because the forward pass saves inputs already cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_rwkv6.checks import explain
from torch_rwkv6.contract import OPERATORS, Argument, Dtype, Operator
from torch_rwkv6.registration.schema import library

DEVICE_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _rule(operator: Operator, device_type: str) -> Callable[..., Any]:
    op = operator.overload

    def kernel(*arguments: Any) -> Any:
        low = torch.get_autocast_dtype(device_type)
        with torch.amp.autocast(device_type, enabled=False):
            cast = cast_all(operator, arguments, low)
            try:
                return op(*cast)
            except Exception:
                explain(operator, cast)
                raise

    return kernel


def cast_all(operator: Operator, arguments: Sequence[Any], low: torch.dtype) -> tuple[Any, ...]:
    """The arguments of a call as the operator is to see them under autocast."""
    return tuple(_cast(a, x, low) for a, x in zip(operator.arguments, arguments))


def _cast(argument: Argument, x: Any, low: torch.dtype) -> Any:
    # float64 is left alone, as by PyTorch's own rules. Arguments that are no tensors are left to
    # the check. A state that is updated in place (Dtype.STATE) must remain the caller's tensor.
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    if argument.dtype in (Dtype.FLOAT, Dtype.SAME):
        return x.to(low)
    return x if argument.dtype is Dtype.STATE else x.to(torch.float32)


for _device_type, _key in DEVICE_KEYS.items():
    for _operator in OPERATORS:
        if _operator.autocast:
            library.impl(_operator.name, _rule(_operator, _device_type), _key)
