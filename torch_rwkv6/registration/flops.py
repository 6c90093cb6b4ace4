"""FLOPs for torch.utils.flop_counter, from which trainers report how well a device is used.

They are those of the recurrence, whatever a kernel really executes; a multiply-add is two. As in
torch's own formulas, what is small beside them is left out: decays, bonus, terms of order N.

WKV6, for each token and head, for all N x N pairs of a key i and a value j: 5 N^2 forward (3 N^2 of
the final state alone), 11 N^2 backward, where states are taken as given, computed again or not::

    y[j]    += r[i] * S[i][j]                                2
    S[i][j]  = decay[i] * S[i][j] + k[i] * v[j]              3

    grad_r[i]     += grad_y[j] * S[i][j]                     2
    grad_k[i]     += v[j] * G[i][j]                          2    (G is the gradient of S)
    grad_v[j]     += k[i] * G[i][j]                          2
    grad_decay[i] += S[i][j] * G[i][j]                       2
    G[i][j]        = decay[i] * G[i][j] + r[i] * grad_y[j]   3

WKV4, for each token and channel: 10 forward, 21 backward (with n = grad_y / D and m = -n * y)::

    D   = den + exp(u + k)                                   2
    y   = (num + exp(u + k) * v) / D                         3
    num = decay * num + exp(k) * v                           3
    den = decay * den + exp(k)                               2

    n, m                                                     2
    grad_v      = exp(u + k) * n + exp(k) * N                3    (N, M: gradients of num, den)
    bonus       = (v * n + m) * exp(u + k)                   3
    grad_u     += bonus                                      1
    grad_k      = bonus + (v * N + M) * exp(k)               4
    grad_decay += num * N + den * M                          4
    N, M        = decay * N + n, decay * M + m               4

A product of a matrix with M vectors: 2 M N K, as torch counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from torch_rwkv6._after_import import after_import
from torch_rwkv6.contract import OPERATORS, WKV_FINAL_STATE, Operator


def _of_wkv(operator: Operator, r: tuple[int, ...], *_: Any) -> int:
    each = 11 if operator.forward else 3 if operator is WKV_FINAL_STATE else 5
    return each * prod(r) * r[-1]


def _of_wkv4(operator: Operator, k: tuple[int, ...], *_: Any) -> int:
    return (21 if operator.forward else 10) * prod(k)


def _of_matvec(operator: Operator, x: tuple[int, ...], weight: tuple[int, ...], *_: Any) -> int:
    return 2 * prod(x) * weight[0]


# By the axes of the first input.
_FORMULAS: dict[str, Callable[..., int]] = {
    "BTHN": _of_wkv,
    "BTD": _of_wkv4,
    "MK": _of_matvec,
}


def _formula(operator: Operator) -> Callable[..., int]:
    inputs = (operator.forward or operator).arguments
    formula = _FORMULAS[inputs[0].axes]

    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        shapes = operator.named(args) | kwargs
        return formula(operator, *(shapes[a.name] for a in inputs))

    return flops


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for operator in OPERATORS:
        register_flop_formula(getattr(torch.ops.rwkv6, operator.name))(_formula(operator))


after_import("torch.utils.flop_counter", _register)
