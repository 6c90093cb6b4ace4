"""What a call costs before it computes anything: the operator on the smallest tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.timing import interleave, machine_line
from torch_rwkv6 import wkv

CALLS = 1000


def repeat(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def main() -> None:
    torch.set_num_threads(1)
    x = [torch.randn(1, 1, 1, 8) for _ in range(4)]  # r, k, v, w [B, T, H, N]
    u, state = torch.randn(1, 8), torch.zeros(1, 1, 8, 8)
    leaves = [a.clone().requires_grad_() for a in (*x, u)]
    op, inplace = torch.ops.rwkv6.wkv.default, torch.ops.rwkv6.wkv_.default

    def inference(call: Callable[[], object]) -> Callable[[], object]:
        return torch.inference_mode()(repeat(call))

    seconds = interleave(
        {
            "torch.add, inference_mode": inference(lambda: torch.add(u, u)),
            "torch.ops.rwkv6.wkv, inference_mode": inference(lambda: op(*x, u)),
            "torch.ops.rwkv6.wkv_, inference_mode": inference(lambda: inplace(*x, u, state)),
            "torch_rwkv6.wkv, inference_mode": inference(lambda: wkv(*x, u)),
            "torch.ops.rwkv6.wkv, autograd recording": repeat(lambda: op(*leaves)),
            "torch_rwkv6.wkv, autograd recording": repeat(lambda: wkv(*leaves)),
        },
        rounds=15,
    )
    print(machine_line())
    print(f"{'one call, B = T = H = 1, N = 8':42} {'min us':>8} {'median us':>10}")
    for name, (least, median) in seconds.items():
        print(f"{name:42} {least / CALLS * 1e6:8.1f} {median / CALLS * 1e6:10.1f}")
