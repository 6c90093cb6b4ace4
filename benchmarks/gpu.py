"""On an NVIDIA GPU: forward, forward + backward and decode, timed by events.

Against the recurrence and a chunked form in PyTorch, eager and under torch.compile, and against
flash-linear-attention where it is installed. bfloat16, as models are trained.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import torch_rwkv6
from benchmarks import figure
from benchmarks.contenders import chunked, compiled, eager
from benchmarks.report import RACE_COLUMNS, Column, Report, Table, number
from benchmarks.shapes import Shape, add_shape_option
from benchmarks.timing import gpu_clock, interleave
from benchmarks.work import Work
from torch_rwkv6 import reference

Function = Callable[..., tuple[Tensor, Tensor]]  # (r, k, v, w, u, state) -> (y, final_state)

SHAPES = [(8, 1024, 8, 64), (8, 4096, 32, 64), (1, 65536, 8, 64)]
SHORT = [(8, 1024, 8, 64)]
DECODE = [(1, 1, 32, 64), (64, 1, 32, 64)]
LOOPED_TOKENS = 1024  # a loop over more is only a matter of patience
CHECKED_TOKENS = 256  # compared with float64
WRONG = 1e-2  # a contender with a larger error is not timed
TURNS, SHORT_TURNS = 20, 5
TURN = 1e-3  # seconds: a shorter call is repeated to fill a turn
COLUMNS = (
    Column("contender", "", left=True),
    Column("median_us", "median, us", number),
    Column("min_us", "min", number),
    *RACE_COLUMNS[3:6],
    RACE_COLUMNS[-1],
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_option(parser)


def run(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu: torch finds no NVIDIA GPU")
    if not torch_rwkv6.has_cuda_kernels:
        sys.exit(
            "gpu: torch_rwkv6 was built without CUDA kernels (install again with RWKV6_CUDA=1)"
        )
    report = Report("gpu", "Median microseconds a call; errors against float64.")
    report.machine = f"{torch.cuda.get_device_name()}, {report.machine}"
    turns = SHORT_TURNS if args.short else TURNS
    for shape in args.shape or (SHORT if args.short else SHAPES):
        for kind in ("forward", "forward + backward"):
            report.add(_table(Work(kind, *shape, dtype="bfloat16"), turns))
    for shape in DECODE if not args.shape else ():
        report.add(_table(Work("decode", *shape, dtype="bfloat16"), turns))
    figure.bars(report, args.out, "median_us", "us")
    report.save(args.out)


def _contenders(work: Work) -> dict[str, Function]:
    loops = {"PyTorch loop": eager.wkv, "PyTorch loop, torch.compile": compiled.loop()}
    if work.kind == "decode":
        found = {"torch_rwkv6": _in_place, **loops}
    else:
        found = {
            "torch_rwkv6": torch_rwkv6.wkv,
            "torch_rwkv6, recurrent": _forced("recurrent"),
            **(loops if work.T <= LOOPED_TOKENS else {}),
            "PyTorch chunked": chunked.wkv,
            "PyTorch chunked, torch.compile": compiled.chunks(),
        }
    try:
        from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
    except ImportError:
        print("no flash-linear-attention: pip install fla-core")
        return found
    recurrent = work.kind == "decode"
    return found | {
        f"fla {'fused_recurrent' if recurrent else 'chunk'}_rwkv6": _fla(
            fused_recurrent_rwkv6 if recurrent else chunk_rwkv6
        )
    }


def _in_place(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Any:
    return torch_rwkv6.wkv_update(r, k, v, w, u, state), state


def _forced(family: str) -> Function:
    def wkv(*args: Tensor) -> tuple[Tensor, Tensor]:
        with _kernel(family):
            return torch_rwkv6.wkv(*args)

    return wkv


@contextmanager
def _kernel(family: str) -> Iterator[None]:
    before = os.environ.get("RWKV6_CUDA_KERNEL", "")
    os.environ["RWKV6_CUDA_KERNEL"] = family
    try:
        yield
    finally:
        os.environ["RWKV6_CUDA_KERNEL"] = before


def _fla(function: Callable[..., Any]) -> Function:
    def wkv(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Any:
        log_decay = -torch.exp(w.float())  # what fla calls w
        return function(
            r, k, v, log_decay, u, scale=1.0, initial_state=state, output_final_state=True
        )

    return wkv


def _inputs(work: Work, shape: Shape) -> list[Tensor]:
    """r, k, v, w, u and state: N(0, 1), w N(-2, 1)."""
    B, T, H, N = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", generator=generator)

    tokens = [normal(B, T, H, N) for _ in range(4)]
    tokens[3] -= 2
    dtype = getattr(torch, work.dtype)
    return [*(x.to(dtype) for x in tokens), normal(H, N).to(dtype), normal(B, H, N, N)]


def _call(work: Work, wkv: Function, args: list[Tensor]) -> Callable[[], Any]:
    if work.kind != "forward + backward":
        return torch.no_grad()(lambda: wkv(*args))
    leaves = [x.detach().requires_grad_() for x in args]
    grad_y = torch.randn_like(args[0])
    return lambda: torch.autograd.grad(wkv(*leaves)[0], leaves, grad_y)


def _error(work: Work, wkv: Function) -> float:
    """Relative RMS of y against float64 on the first tokens of one batch row."""
    args = _inputs(work, (1, min(work.T, CHECKED_TOKENS), work.H, work.N))
    exact, _ = reference.recurrence(*(x.double() for x in args))
    with torch.no_grad():
        y, _ = wkv(*(x.clone() for x in args))
    return ((y.double() - exact).norm() / exact.norm()).item()


def _table(work: Work, turns: int) -> Table:
    args = _inputs(work, (work.B, work.T, work.H, work.N))
    rows, calls = [], {}
    for name, wkv in _contenders(work).items():
        row: dict[str, Any] = {"contender": name, "kind": work.kind}
        rows.append(row)
        try:
            row["error"] = _error(work, wkv)
            if row["error"] > WRONG:
                row["note"] = "wrong, not timed"
                continue
            call = _call(work, wkv, [x.clone() for x in args])
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            calls[name] = call
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
    times = interleave(calls, turns, gpu_clock, TURN)
    for row in rows:
        if row["contender"] in times:
            row["min_us"], row["median_us"] = (s * 1e6 for s in times[row["contender"]])
            row["ratio"] = row["median_us"] / (times["torch_rwkv6"][1] * 1e6)
            row["gb_per_s"] = work.traffic / row["median_us"] / 1e3
    return Table(f"{work.kind}, {work}, {work.dtype}", COLUMNS, rows)
