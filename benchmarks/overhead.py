"""What a call costs before it computes anything: the operator on the smallest tensors."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks import figure
from benchmarks.report import Column, Report, Table, number
from benchmarks.timing import interleave
from torch_rwkv6 import wkv, wkv_update

CALLS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    x = [torch.randn(1, 1, 1, 8) for _ in range(4)]  # r, k, v, w [B, T, H, N]
    u, state = torch.randn(1, 8), torch.zeros(1, 1, 8, 8)
    leaves = [a.clone().requires_grad_() for a in (*x, u)]
    op, update = torch.ops.rwkv6.wkv.default, torch.ops.rwkv6.wkv_update.default
    seconds = interleave(
        {
            "torch.add, inference mode": _inference(lambda: torch.add(u, u)),
            "torch.ops.rwkv6.wkv, inference mode": _inference(lambda: op(*x, u)),
            "torch.ops.rwkv6.wkv_update, inference mode": _inference(lambda: update(*x, u, state)),
            "torch_rwkv6.wkv, inference mode": _inference(lambda: wkv(*x, u)),
            "torch_rwkv6.wkv_update, inference mode": _inference(lambda: wkv_update(*x, u, state)),
            "torch.ops.rwkv6.wkv, autograd recording": _repeat(lambda: op(*leaves)),
            "torch_rwkv6.wkv, autograd recording": _repeat(lambda: wkv(*leaves)),
        },
        rounds=5 if args.short else 15,
    )
    rows = [
        {"contender": name, "min_us": least / CALLS * 1e6, "median_us": median / CALLS * 1e6}
        for name, (least, median) in seconds.items()
    ]
    columns = (
        Column("contender", "", left=True),
        Column("min_us", "us min", number),
        Column("median_us", "median", number),
    )
    report = Report("overhead", "One call on the smallest tensors: microseconds.")
    report.add(Table("one call, B1 T1 H1 N8, 1 thread", columns, rows))
    figure.bars(report, args.out, "min_us", "us")
    report.save(args.out)


def _repeat(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def _inference(call: Callable[[], object]) -> Callable[[], object]:
    return torch.inference_mode()(_repeat(call))
