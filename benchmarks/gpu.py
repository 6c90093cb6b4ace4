"""On an NVIDIA GPU: forward, forward + backward and decode, timed by events.

Against the recurrence and a chunked form in PyTorch, eager and under torch.compile, and against
flash-linear-attention where it is installed. Inputs alternate between copies that together are
larger than the L2 cache, so that every call reads from memory. Errors are those of all outputs
that are timed, over all tokens, against float64.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import torch_rwkv6
from benchmarks import figure
from benchmarks.contenders import chunked, compiled, eager
from benchmarks.report import RACE_COLUMNS, Column, Report, Table, number
from benchmarks.shapes import add_shape_option
from benchmarks.timing import gpu_clock, interleave, wall_clock
from benchmarks.work import Work

Function = Callable[..., tuple[Tensor, Tensor]]  # (r, k, v, w, u, state) -> (y, final_state)

TRAINING = [
    ((8, 1024, 8, 64), "bfloat16"),
    ((8, 4096, 32, 64), "bfloat16"),
    ((1, 65536, 8, 64), "bfloat16"),
    ((8, 1024, 4, 128), "bfloat16"),
    ((8, 1024, 16, 32), "bfloat16"),
    ((8, 1024, 8, 64), "float32"),
]
SHORT = TRAINING[:1]
DECODE = [(1, 1, 32, 64), (64, 1, 32, 64)]
LOOPED_TOKENS = 1024  # a loop over more is only a matter of patience
DEVICE = "cuda"
RECURRENT = "torch_rwkv6, recurrent"
WRONG = 1e-2  # a contender with a larger error is not timed
TURNS, SHORT_TURNS = 20, 5
TURN = 1e-3  # seconds: a shorter call is repeated to fill a turn
COPY_BYTES = 2**30
_RACE = {column.key: column for column in RACE_COLUMNS}
COLUMNS = (
    _RACE["contender"],
    Column("median_us", "median, us", number),
    Column("min_us", "min", number),
    Column("host_us", "host", number),
    _RACE["ratio"],
    _RACE["gb_per_s"],
    Column("of_copy", "of a copy's", lambda share: f"{share:.0%}"),
    _RACE["error"],
    _RACE["note"],
)
KERNEL_COLUMNS = (
    Column("kernel", "", left=True),
    Column("calls", "calls"),
    Column("us", "us", number),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shape_option(parser)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the inputs of every --shape (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu: torch finds no NVIDIA GPU")
    if not torch_rwkv6.has_cuda_kernels:
        sys.exit(
            "gpu: torch_rwkv6 was built without CUDA kernels (install again with RWKV6_CUDA=1)"
        )
    report = Report("gpu", "Median microseconds a call; errors against float64.")
    bandwidth = copy_bandwidth()
    report.machine = (
        f"{torch.cuda.get_device_name()}, a copy moves {number(bandwidth)} GB/s (read and "
        f"written), {report.machine}"
    )
    print(report.machine, flush=True)
    turns = SHORT_TURNS if args.short else TURNS
    training = [(shape, args.dtype) for shape in args.shape or ()]
    for shape, dtype in training or (SHORT if args.short else TRAINING):
        for kind in ("forward", "forward + backward"):
            work = Work(kind, *shape, dtype=dtype)
            report.add(_table(work, turns, bandwidth, args.short))
        report.add(_kernels(work))
    for shape in DECODE if not args.shape else ():
        report.add(_table(Work("decode", *shape, dtype="bfloat16"), turns, bandwidth, args.short))
    figure.bars(report, args.out, "median_us", "us")
    report.save(args.out)


def copy_bandwidth() -> float:
    """GB/s that a copy of a gibibyte on the GPU reads and writes together."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, SHORT_TURNS, gpu_clock, TURN)
    return 2 * COPY_BYTES / times["copy"][1] / 1e9


def _contenders(work: Work, short: bool) -> dict[str, Function]:
    looped = {"PyTorch loop": eager.wkv} if work.T <= LOOPED_TOKENS else {}
    if looped and not short:
        looped["PyTorch loop, torch.compile"] = compiled.loop()
    if work.kind == "decode":
        found = {"torch_rwkv6": _in_place, "torch_rwkv6, CUDA graph": _in_place, **looped}
    else:
        found = {"torch_rwkv6": torch_rwkv6.wkv}
        if work.dtype != "float32":  # which has the recurrent kernels only
            found[RECURRENT] = torch_rwkv6.wkv
        found |= looped | {"PyTorch chunked": chunked.wkv}
        if not short:
            found["PyTorch chunked, torch.compile"] = compiled.chunks()
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
def kernel_family(name: str) -> Iterator[None]:
    """Calls run the recurrent or the chunked kernels meanwhile."""
    before = os.environ.get("RWKV6_CUDA_KERNEL")
    os.environ["RWKV6_CUDA_KERNEL"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["RWKV6_CUDA_KERNEL"]
        else:
            os.environ["RWKV6_CUDA_KERNEL"] = before


def _recurrent(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same, by the recurrent kernels, in the backward too."""

    def forced() -> Any:
        with kernel_family("recurrent"):
            return call()

    return forced


def _fla(function: Callable[..., Any]) -> Function:
    def wkv(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Any:
        log_decay = -torch.exp(w.float())  # what fla calls w
        return function(
            r, k, v, log_decay, u, scale=1.0, initial_state=state, output_final_state=True
        )

    return wkv


def _inputs(work: Work, seed: int = 0) -> list[Tensor]:
    """r, k, v, w, u and state: N(0, 1), w N(-2, 1)."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=DEVICE, generator=generator)

    B, T, H, N = work.B, work.T, work.H, work.N
    tokens = [normal(B, T, H, N) for _ in range(4)]
    tokens[3] -= 2
    dtype = getattr(torch, work.dtype)
    return [*(x.to(dtype) for x in tokens), normal(H, N).to(dtype), normal(B, H, N, N)]


def _call(work: Work, wkv: Function, args: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call without arguments that returns what `work` asks for, a gradient for each input."""
    if work.kind != "forward + backward":
        return torch.no_grad()(lambda: wkv(*args))
    leaves = [x.detach().requires_grad_() for x in args]
    grad_y = torch.arange(work.T, device=DEVICE).cos()[None, :, None, None].expand_as(args[0])
    grad_y = grad_y.to(args[0].dtype).contiguous()  # any numbers, the same for every row
    return lambda: torch.autograd.grad(wkv(*leaves)[0], leaves, grad_y)


def _prepared(
    work: Work, name: str, wkv: Function, args: list[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """The call of a contender: the one called RECURRENT runs the recurrent kernels."""
    call = _call(work, wkv, args)
    return _recurrent(call) if name == RECURRENT else call


def _graph(call: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _exact(work: Work) -> tuple[Tensor, ...]:
    """What a call with the first inputs returns, by a chunked form in float64, row by row of B."""
    *tokens, u, state = (x.double() for x in _inputs(work))
    rows = [
        _call(
            replace(work, B=1), chunked.wkv, [*(x[b : b + 1] for x in tokens), u, state[b : b + 1]]
        )()
        for b in range(work.B)
    ]
    outputs = zip(*rows, strict=True)
    return tuple(torch.stack(x).sum(0) if x[0].shape == u.shape else torch.cat(x) for x in outputs)


def _error(work: Work, name: str, wkv: Function, exact: tuple[Tensor, ...]) -> float:
    """The largest relative RMS error of an output."""
    found = _prepared(work, name, wkv, _inputs(work))()
    return max(_relative(a, b) for a, b in zip(found, exact, strict=True))


def _relative(found: Tensor, exact: Tensor) -> float:
    error = ((found.double() - exact).norm() / exact.norm()).item()
    return math.inf if math.isnan(error) else error


def _table(work: Work, turns: int, bandwidth: float, short: bool) -> Table:
    copies = 1 + 2 * torch.cuda.get_device_properties().L2_cache_size // work.footprint
    copies = min(copies, 8) if work.kind == "decode" else copies
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}
    inputs = [_inputs(work, seed) for seed in range(copies)]
    exact = _exact(work)
    for name, wkv in _contenders(work, short).items():
        row: dict[str, Any] = {"contender": name, "kind": work.kind, "dtype": work.dtype}
        rows.append(row)
        try:
            row["error"] = _error(work, name, wkv, exact)
            if not row["error"] <= WRONG:
                row["note"] = "wrong, not timed"
                continue
            each = [_prepared(work, name, wkv, [x.clone() for x in args]) for args in inputs]
            if name.endswith("CUDA graph"):
                each = [_graph(call) for call in each]
            for call in each * 3:  # what a first call does besides is not to be timed
                call()
            row["host_us"] = _host_time(each) * 1e6
            calls[name] = _in_turns(each)
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
    times = interleave(calls, turns, gpu_clock, TURN)
    for row in rows:
        if row["contender"] in times:
            row["min_us"], row["median_us"] = (s * 1e6 for s in times[row["contender"]])
            if "torch_rwkv6" in times:
                row["ratio"] = times[row["contender"]][1] / times["torch_rwkv6"][1]
            row["gb_per_s"] = work.traffic / row["median_us"] / 1e3
            row["of_copy"] = row["gb_per_s"] / bandwidth
    return Table(f"{work.kind}, {work}, {work.dtype}", COLUMNS, rows)


def _kernels(work: Work) -> Table:
    """What runs on the GPU in one call of ours, by torch's profiler."""
    call = _call(work, torch_rwkv6.wkv, _inputs(work))
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    rows = [
        {"kernel": _short(event.key), "calls": event.count, "us": event.device_time_total}
        for event in profile.key_averages()
        if event.device_time_total
    ]
    rows.sort(key=lambda row: -row["us"])
    return Table(f"kernels of {work.kind}, {work}, {work.dtype}", KERNEL_COLUMNS, rows)


def _short(kernel: str) -> str:
    """A kernel's name without return type, namespaces and arguments."""
    for part in ("(anonymous namespace)::", "void ", "rwkv6::cuda::", "rwkv6::", "(bool)"):
        kernel = kernel.replace(part, "")
    return kernel.split("(")[0]


def _in_turns(each: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The calls as one, a different one every time."""
    following = itertools.cycle(each)
    return lambda: next(following)()


def _host_time(each: Sequence[Callable[[], Any]]) -> float:
    """Seconds of the CPU for one call, while the GPU is not waited for."""
    torch.cuda.synchronize()
    host = wall_clock(_in_turns(each), len(each))
    torch.cuda.synchronize()
    return host
