"""Fake (meta) implementations: shapes, dtypes and devices without computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_rwkv6.checks import check
from torch_rwkv6.contract import OPERATORS, Operator


def _fake(operator: Operator) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        sizes = check(operator, arguments)
        if operator.forward is not None:
            return _gradients(operator.forward, arguments[-len(operator.forward.arguments) :])
        first = arguments[0]
        results = tuple(
            first.new_empty(
                [int(a) if a.isdigit() else sizes[a] for a in result.axes],
                dtype=result.dtype.allowed(first)[0],
            )
            for result in operator.results
        )
        return results if len(results) > 1 else results[0]

    return kernel


def _gradients(forward: Operator, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Empty tensors like the inputs."""
    found = (inputs[i] for i in forward.differentiable)
    return tuple(
        inputs[0].new_empty((0,), dtype=torch.float32) if x is None else x.new_empty(x.shape)
        for x in found
    )


for _operator in OPERATORS:
    torch.library.register_fake(f"rwkv6::{_operator.name}", _fake(_operator))
