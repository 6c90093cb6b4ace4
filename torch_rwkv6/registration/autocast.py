"""Mixed precision: r, k, v go to the autocast dtype; w, u and the state stay float32.

The decay exp(-exp(w)) acts on the state once per token: rounded to 8 bits it would change what a
model remembers. `wkv_backward` needs no rule: it gets what the forward pass saved, already cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_rwkv6.checks import check
from torch_rwkv6.contract import OPERATORS, Argument, Dtype, Operator
from torch_rwkv6.registration.schema import library

DEVICE_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _rule(operator: Operator, device_type: str) -> Callable[..., Any]:
    op = operator.overload

    def kernel(*arguments: Any) -> Any:
        low = torch.get_autocast_dtype(device_type)
        with torch.amp.autocast(device_type, enabled=False):
            cast = [_cast(a, x, low) for a, x in zip(operator.arguments, arguments)]
            check(operator, cast)
            return op(*cast)

    return kernel


def _cast(argument: Argument, x: Any, low: torch.dtype) -> Any:
    # PyTorch's own rules leave float64 alone as well. What is no tensor is left to the check, and
    # a state that is updated in place (Dtype.STATE) must stay the caller's own.
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    if argument.dtype in (Dtype.FLOAT, Dtype.SAME):
        return x.to(low)
    return x if argument.dtype is Dtype.STATE else x.to(torch.float32)


for _device_type, _key in DEVICE_KEYS.items():
    for _operator in OPERATORS:
        if _operator.autocast:
            library.impl(_operator.name, _rule(_operator, _device_type), _key)
