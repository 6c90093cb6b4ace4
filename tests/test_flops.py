"""FlopCounterMode counts what the recurrence costs, multiply-adds as two.

The oracle is the recurrence run on numbers that count their multiplications, additions and
divisions, and that give the operator's results and gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from samples import random_call
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import torch_rwkv6
from torch_rwkv6.contract import OPERATORS


@dataclass
class Number:
    """A float whose arithmetic is counted."""

    value: float
    operations = 0

    def _count(self, value: float) -> Number:
        Number.operations += 1
        return Number(value)

    def __add__(self, other: Number) -> Number:
        return self._count(self.value + other.value)

    def __sub__(self, other: Number) -> Number:
        return self._count(self.value - other.value)

    def __mul__(self, other: Number) -> Number:
        return self._count(self.value * other.value)

    def __truediv__(self, other: Number) -> Number:
        return self._count(self.value / other.value)

    def __neg__(self) -> Number:
        return Number(-self.value)

    def exp(self) -> Number:
        return Number(math.exp(self.value))


def numbers(values: torch.Tensor) -> list:
    """As nested lists of numbers."""
    return [numbers(x) for x in values] if values.dim() else Number(values.item())


def zeros(*shape: int) -> list:
    return numbers(torch.zeros(shape, dtype=torch.float64))


def values(nested) -> torch.Tensor:
    """The tensor of nested lists of numbers."""
    if isinstance(nested, Number):
        return torch.tensor(nested.value, dtype=torch.float64)
    return torch.stack([values(x) for x in nested])


def counted(run) -> dict:
    """The FLOPs of each operator by its name."""
    with FlopCounterMode(display=False) as counter:
        run()
    found = counter.get_flop_counts().get("Global", {})
    return {str(packet).removeprefix("rwkv6."): flops for packet, flops in found.items()}


def test_wkv_forward_and_backward():
    T, N = 3, 4
    call = random_call(B=1, T=T, H=1, N=N, dtype=torch.float64, states=1)
    call.u.zero_()  # the bonus is of order N and not counted
    grad_y, grad_state = call.grad_outputs()

    def run():
        y, state = torch.ops.rwkv6.wkv(*call.args())
        run.results = y[0, :, 0], state[0, 0]
        run.grads = torch.ops.rwkv6.wkv_backward(grad_y, grad_state, *call.args())

    flops = counted(run)

    r, k, v, decay = (numbers(x[0, :, 0]) for x in (call.r, call.k, call.v, -call.w.exp()))
    decay = [[d.exp() for d in row] for row in decay]
    S, before, y = numbers(call.initial_state[0, 0]), [], zeros(T, N)
    Number.operations = 0
    for t in range(T):
        before.append([list(row) for row in S])
        for i in range(N):
            for j in range(N):
                y[t][j] += r[t][i] * S[i][j]
                S[i][j] = decay[t][i] * S[i][j] + k[t][i] * v[t][j]
    assert flops["wkv"] == Number.operations == 5 * T * N * N
    torch.testing.assert_close((values(y), values(S)), run.results)

    gy, G = numbers(grad_y[0, :, 0]), numbers(grad_state[0, 0])
    gr, gk, gv, gd = (zeros(T, N) for _ in range(4))
    Number.operations = 0
    for t in reversed(range(T)):
        for i in range(N):
            for j in range(N):
                gr[t][i] += gy[t][j] * before[t][i][j]
                gk[t][i] += v[t][j] * G[i][j]
                gv[t][j] += k[t][i] * G[i][j]
                gd[t][i] += before[t][i][j] * G[i][j]
                G[i][j] = decay[t][i] * G[i][j] + r[t][i] * gy[t][j]
    assert flops["wkv_backward"] == Number.operations == 11 * T * N * N
    grad_w = values(gd) * values(decay) * -call.w[0, :, 0].exp()
    found = [x[0, :, 0] for x in run.grads[:4]]
    torch.testing.assert_close(found, [values(gr), values(gk), values(gv), grad_w])
    torch.testing.assert_close(run.grads[5][0, 0], values(G))


def test_wkv4_forward_and_backward():
    T = 4
    k, v = (torch.randn(1, T, 1, dtype=torch.float64) for _ in range(2))
    w, u = (torch.randn(1, dtype=torch.float64) for _ in range(2))
    grad_y = torch.randn(1, T, 1, dtype=torch.float64)

    def run():
        run.y = torch.ops.rwkv6.wkv4(k, v, w, u)[0]
        run.grads = torch.ops.rwkv6.wkv4_backward(grad_y, None, k, v, w, u, None)

    flops = counted(run)

    K, V, gy = (numbers(x[0, :, 0]) for x in (k, v, grad_y))
    U, decay = Number(u.item()), Number(math.exp(-math.exp(w.item())))
    num = den = Number(0.0)
    y, before = [], []
    Number.operations = 0
    for t in range(T):
        e = (U + K[t]).exp()
        D = den + e
        y.append((num + e * V[t]) / D)
        before.append((num, den, e, D))
        num, den = decay * num + K[t].exp() * V[t], decay * den + K[t].exp()
    assert flops["wkv4"] == Number.operations == 10 * T
    torch.testing.assert_close(values(y), run.y[0, :, 0])

    N = M = gu = gd = Number(0.0)
    gk, gv = zeros(T), zeros(T)
    Number.operations = 0
    for t in reversed(range(T)):
        num, den, e, D = before[t]
        n = gy[t] / D
        m = -n * y[t]
        gv[t] = e * n + K[t].exp() * N
        bonus = (V[t] * n + m) * e
        gu = gu + bonus
        gk[t] = bonus + (V[t] * N + M) * K[t].exp()
        gd = gd + (num * N + den * M)
        N, M = decay * N + n, decay * M + m
    assert flops["wkv4_backward"] == Number.operations == 21 * T
    grad_k, grad_v, grad_w, grad_u, _ = run.grads
    found = [grad_k[0, :, 0], grad_v[0, :, 0], grad_w[0], grad_u[0]]
    expected_w = values(gd) * decay.value * -w.exp()[0]
    torch.testing.assert_close(found, [values(gk), values(gv), expected_w, values(gu)])


def test_every_operator_and_every_dimension():
    B, T, H, N, D = 2, 3, 5, 8, 7
    r, k, v, w = (torch.randn(B, T, H, N) for _ in range(4))
    u, state = torch.randn(H, N), torch.zeros(B, H, N, N)
    k4, w4, state4 = torch.randn(B, T, D), torch.randn(D), torch.zeros(B, 3, D)
    x, weight, scale = torch.randn(B, N), torch.randn(H, N), torch.ones(H)
    wkv, wkv4 = (r, k, v, w, u, state), (k4, k4, w4, w4, state4)
    calls = {
        "wkv": ((*wkv, None, None), 5 * B * T * H * N * N),
        "wkv_backward": ((r, None, *wkv, None, None), 11 * B * T * H * N * N),
        "wkv_update": (wkv, 5 * B * T * H * N * N),
        "wkv_final_state": ((k, v, w, state), 3 * B * T * H * N * N),
        "wkv4": (wkv4, 10 * B * T * D),
        "wkv4_backward": ((k4, None, *wkv4), 21 * B * T * D),
        "wkv4_update": (wkv4, 10 * B * T * D),
        "matvec": ((x, weight), 2 * B * N * H),
        "matvec_int8": ((x, weight.to(torch.int8), scale), 2 * B * N * H),
    }
    for name, (arguments, expected) in calls.items():
        operator = getattr(torch.ops.rwkv6, name)
        assert counted(lambda: operator(*arguments)) == {name: expected}  # noqa: B023
    assert all(getattr(torch.ops.rwkv6, o.name) in flop_registry for o in OPERATORS)
    # The counter sees what autograd runs.
    leaves = [x.clone().requires_grad_() for x in wkv]
    flops = counted(lambda: torch_rwkv6.wkv(*leaves)[0].sum().backward())
    assert sum(flops.values()) == (5 + 11) * B * T * H * N * N
    named = {"r": r, "k": k, "v": v, "w": w, "u": u}
    assert counted(lambda: torch.ops.rwkv6.wkv(**named)) == {"wkv": calls["wkv"][1]}
