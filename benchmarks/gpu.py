"""On an NVIDIA GPU: forward, forward + backward and decode, timed by events.

Against the recurrence and a chunked form in PyTorch, eager and under torch.compile, and against
flash-linear-attention where it is installed. bfloat16, as models are trained.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
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
from benchmarks.work import Work
from torch_rwkv6 import reference

Function = Callable[..., tuple[Tensor, Tensor]]  # (r, k, v, w, u, state) -> (y, final_state)

SHAPES = [(8, 1024, 8, 64), (8, 4096, 32, 64), (1, 65536, 8, 64)]
SHORT = [(8, 1024, 8, 64)]
DECODE = [(1, 1, 32, 64), (64, 1, 32, 64)]
LOOPED_TOKENS = 1024  # a loop over more is only a matter of patience
CHECKED_TOKENS = 1024  # compared with float64: several segments, so every kernel
WRONG = 1e-2  # a contender with a larger error is not timed
TURNS, SHORT_TURNS = 20, 5
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
            "torch_rwkv6, recurrent": torch_rwkv6.wkv,
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


@contextmanager
def _kernel(contender: str) -> Iterator[None]:
    """The family of kernels that the contender is about, in its backward too."""
    family = "recurrent" if contender.endswith(", recurrent") else ""
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


def _call(work: Work, name: str, wkv: Function, args: list[Tensor]) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in args]
    grad_y = torch.randn_like(args[0])

    def call() -> Any:
        with _kernel(name):
            if work.kind == "forward + backward":
                return torch.autograd.grad(wkv(*leaves)[0], leaves, grad_y)
            with torch.no_grad():
                return wkv(*args)

    return call


def _error(work: Work, name: str, wkv: Function) -> float:
    """The larger relative RMS, of y and the final state, against float64 on the first tokens of one
    batch row; NaN is infinitely wrong.
    """
    args = _inputs(work, (1, min(work.T, CHECKED_TOKENS), work.H, work.N))
    exact = reference.recurrence(*(x.double() for x in args))
    with torch.no_grad(), _kernel(name):
        found = wkv(*(x.clone() for x in args))
    errors = [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)
    ]
    return max(math.inf if math.isnan(error) else error for error in errors)


def _table(work: Work, turns: int) -> Table:
    args = _inputs(work, (work.B, work.T, work.H, work.N))
    rows, calls = [], {}
    for name, wkv in _contenders(work).items():
        row: dict[str, Any] = {"contender": name, "kind": work.kind}
        rows.append(row)
        try:
            row["error"] = _error(work, name, wkv)
            if row["error"] > WRONG:
                row["note"] = "wrong, not timed"
                continue
            call = _call(work, name, wkv, [x.clone() for x in args])
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            calls[name] = call
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
    times = _race(calls, turns)
    for row in rows:
        if row["contender"] in times:
            measured = times[row["contender"]]
            row["median_us"], row["min_us"] = statistics.median(measured), min(measured)
            row["ratio"] = row["median_us"] / statistics.median(times["torch_rwkv6"])
            row["gb_per_s"] = work.traffic / row["median_us"] / 1e3
    return Table(f"{work.kind}, {work}, {work.dtype}", COLUMNS, rows)


def _race(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Microseconds of each call, taken in turns. A turn repeats a short call for a millisecond."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            once = times[name][0] if times[name] else _time(call, 1)
            repeats = max(1, round(1000 / once))
            times[name].append(_time(call, repeats))
    return times


def _time(call: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats
