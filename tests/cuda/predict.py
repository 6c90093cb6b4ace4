"""How long the CUDA kernels take, predicted without a GPU, beside what was measured on one.

    cd tests && python -m cuda.predict [--arch 90 ...] [--write]     (--write: into docs/cuda.md)

What a block does for a token is counted under ptxcpu: instructions, wavefronts of shared memory,
flops of the tensor cores, distinct sectors of global memory. Which kernels a call launches, with
how many blocks, its own host code says, which believes that it has such a GPU; nothing runs there.
ptxas makes each architecture's machine code of the same PTX; it says how many blocks a
multiprocessor holds and how long one warp takes by itself. ptxcpu/speed.py makes a time of that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from dlpack import K_CUDA, DLTensor, int64s
from ptxcpu import build, sass, speed
from ptxcpu.runtime import Launch
from samples import random_call

from cuda.gpu import ROOT, build_library
from cuda.gpu import gpu as gpu_of


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    N: int


# Microseconds of a call, forward and forward + backward, by docs/cuda.md, Times. An H100 has an
# H200's multiprocessors and slower memory, which limits none of these kernels.
MEASURED = {
    Shape(8, 1024, 8, 64): {"H200": (68, 314), "H100": (101, 101 + 296)},
    Shape(8, 4096, 32, 64): {"H200": (502, 3178), "H100": (548, 548 + 2771)},
    Shape(1, 65536, 8, 64): {"H200": (337, 1964), "H100": (390, 390 + 1724)},
    Shape(8, 1024, 4, 128): {"H200": (105, 517), "H100": (138, 138 + 486)},
}
# and of the first of these on an H200, kernel by kernel
MEASURED_KERNELS = {
    "state_walk": 80,
    "scan": 33,
    "forward_chunked": 31,
    "backward_chunked": 153,
    "sum_heads": 2,
}
CHUNK = 16  # tokens
NOWHERE = 4096  # the address of what no kernel reads or writes
COUNTED = ((256, 128), (768, 256))  # T and the length of its segments
PAGE = ROOT / "docs/cuda.md"
MARKERS = ("<!-- predictions: python -m cuda.predict -->", "<!-- end of predictions -->")


# ---- what a call launches ----


@dataclass(frozen=True)
class Role:
    """A launch's place in a call. `later` launches of its kernel follow it there: where sequences
    are not cut into segments, it is the first ones that are missing."""

    call: str  # "forward" or "backward"
    kernel: str  # as the compiler mangles it
    later: int

    @property
    def name(self) -> str:
        return re.findall(r"\d([a-z_]+)_kernel", self.kernel)[0]

    @property
    def purpose(self) -> str:
        """The name, and which of a backward's walks it is."""
        if self.name != "state_walk" or self.call == "forward":
            return self.name
        if "Lb1E" in self.kernel:  # template argument `reverse`
            return "state_walk, back"
        return "state_walk, forth" if self.later else "state_walk, checkpoints"


def by_role(call: str, launches: Sequence[Launch]) -> dict[Role, Launch]:
    names = [launch.kernel for launch in launches]
    return {Role(call, n, names[i + 1 :].count(n)): launches[i] for i, n in enumerate(names)}


class Outline:
    """A tensor that is nowhere: for kernels that do not run."""

    def __init__(self, dtype: torch.dtype, *shape: int):
        code, bits = (4, 16) if dtype == torch.bfloat16 else (2, 32)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        extents = int64s(shape), int64s(strides)
        self.dl = DLTensor(NOWHERE, K_CUDA, 0, len(shape), code, bits, 1, *extents, 0)


# ---- what the blocks of a launch do ----


def length(role: Role, shape: Shape, segments: int) -> float:
    """Of a block: in tokens, or in the segments that it goes through."""
    if role.name == "scan":
        return segments
    return shape.B * segments if role.name == "sum_heads" else shape.T / segments


def tensor_flops(instructions: dict[str, int]) -> int:
    """TF32 counts twice: an instruction has half as many numbers and takes as long."""
    total = 0
    for opcode, count in instructions.items():
        if m := re.match(r"mma\.sync.*\.m(\d+)n(\d+)k(\d+)", opcode):
            each = 2 * int(m[1]) * int(m[2]) * int(m[3])
            total += count * each * (2 if ".tf32" in opcode else 1)
    return total


COUNTS = ("PTX instructions", "wavefronts", "bank conflicts", "tensor flops", "DRAM bytes")


def counts(launch: Launch) -> list[float]:
    """Of an average block, in the order of COUNTS."""
    found = launch.statistics
    shuffles = sum(n for opcode, n in launch.instructions.items() if opcode.startswith("shfl"))
    totals = [
        found["warp_instructions"],
        found["shared_wavefronts"] + shuffles,  # a shuffle takes a cycle of shared memory as well
        found["shared_wavefronts"] - found["shared_wavefronts_ideal"],
        tensor_flops(launch.instructions),
        32 * (found["footprint_read_sectors"] + found["footprint_written_sectors"]),
    ]
    return [total / launch.grid[0] for total in totals]


@dataclass(frozen=True)
class Line:
    """A count of a block by its length."""

    start: float
    each: float

    def at(self, length: float) -> float:
        return self.start + self.each * length


@functools.cache
def counted(N: int) -> dict[Role, dict[str, Line]]:
    """What the blocks of each launch do: two calls are cut into segments and run."""
    device = gpu_of()
    samples = []
    for T, segment in COUNTED:
        shape = Shape(1, T, 1, N)
        call = random_call(*shape, torch.bfloat16, states=1)
        with device.runtime.settings(check=0, footprint=1), cut_into(segment):
            device.runtime.reset()
            device.forward(call)
            forward = device.runtime.launches()
            device.backward(call, *call.grad_outputs())
        backward = device.runtime.launches()[len(forward) :]
        launches = by_role("forward", forward) | by_role("backward", backward)
        found = {
            role: (length(role, shape, T // segment), counts(launches[role])) for role in launches
        }
        samples.append(found)
    lines = {}
    for role, (short, few) in samples[0].items():
        long, many = samples[1][role]
        slopes = [(b - a) / (long - short) for a, b in zip(few, many, strict=True)]
        lines[role] = {
            name: Line(a - slope * short, slope)
            for name, a, slope in zip(COUNTS, few, slopes, strict=True)
        }
    return lines


@contextlib.contextmanager
def cut_into(segment: int) -> Iterator[None]:
    """Sequences are cut into segments of so many tokens."""
    os.environ["RWKV6_CUDA_SEGMENT"] = str(segment)
    try:
        yield
    finally:
        del os.environ["RWKV6_CUDA_SEGMENT"]


# ---- machine code ----


@functools.cache
def ptx_files() -> list[Path]:
    """Of the library that ran above."""
    library = build_library()
    command = [build.tool("cuobjdump"), "-xptx", "all", library]
    folder = build.cached(
        "kernels-ptx",
        command,
        [library],
        lambda to: subprocess.run(command, cwd=to, check=True, capture_output=True),
    )
    return sorted(folder.glob("*.ptx"))


@dataclass(frozen=True)
class Code:
    kernel: sass.Kernel
    per_ptx: float  # instructions for one of PTX's
    cycles: float  # that a warp by itself takes for an instruction, on average


def ptx_opcodes(ptx: str, symbol: str) -> list[str]:
    """Of the instructions of a kernel, which calls no functions."""
    body = re.split(r"\.entry |\.func ", ptx.split(f".entry {symbol}(")[1])[0]
    statements = re.split(r"[;{}]|^\$\w+:|//.*", body[body.index("{") :], flags=re.MULTILINE)
    found = (re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", each) for each in statements)
    return [each[1] for each in found if each]


@functools.cache
def ptx_of(symbol: str) -> tuple[Path, int]:
    """The file with a kernel's PTX, and how many instructions that has."""
    texts = ((file, file.read_text()) for file in ptx_files())
    file, text = next((file, text) for file, text in texts if f".entry {symbol}(" in text)
    return file, len(ptx_opcodes(text, symbol))


@functools.cache
def code_of(symbol: str, arch: str) -> Code:
    file, ptx_instructions = ptx_of(symbol)
    command = [build.tool("ptxas"), f"-arch=sm_{arch}", f"--entry={symbol}", file]
    folder = build.cached(
        f"predict-{arch}", command, [file], lambda to: build.run([*command, "-o", to / "one.cubin"])
    )
    (kernel,) = sass.inspect(folder / "one.cubin")
    loop = kernel.main_loop.instructions if kernel.main_loop else kernel.instructions
    instructions = len(kernel.instructions) - kernel.count("NOP")
    cycles = speed.alone_cycles(loop) / len(loop)
    return Code(kernel, instructions / ptx_instructions, cycles)


# ---- times ----


def launches_of(
    gpu: speed.Gpu, shape: Shape, registers: dict[str, int] | None = None
) -> dict[Role, Launch]:
    """Of a forward and a backward of a batch in bfloat16, with states in and out: no kernel runs.

    registers: of the kernels that the host asks about, how many blocks of them fit; by call.
    """
    B, T, H, N = shape
    rows, u = Outline(torch.bfloat16, B, T, H, N), Outline(torch.bfloat16, H, N)
    states = Outline(torch.float32, B, H, N, N)
    inputs = [rows, rows, rows, rows, u, states]
    arguments = {
        "forward": [None, None, rows, states],
        "backward": [None, None, None, rows, states, *inputs],
    }
    device, launches = gpu_of(), {}
    workspace_is_nowhere = mock.patch.object(device, "allocate", return_value=NOWHERE)
    settings = {"execute": 0, "cc": int(gpu.arch), "multiprocessors": gpu.multiprocessors}
    for call, others in arguments.items():
        asked = (registers or {}).get(call, 0)
        with device.runtime.settings(**settings, registers=asked), workspace_is_nowhere:
            device.runtime.reset()
            device.run(call, *inputs, *others)
        launches |= by_role(call, device.runtime.launches())
    return launches


@dataclass(frozen=True)
class Row:
    """A launch, in microseconds."""

    role: Role
    predicted: float
    limit: str
    blocks_each: int  # of a multiprocessor
    waves: int
    floor: float  # what it reads and writes at the speed of memory


@functools.cache
def predicted(gpu: speed.Gpu, shape: Shape) -> list[Row]:
    lines = counted(shape.N)
    main = {role.call: role for role in lines if role.name == f"{role.call}_chunked"}
    codes = {role: code_of(role.kernel, gpu.arch) for role in lines}
    registers = {call: codes[role].kernel.registers for call, role in main.items()}
    launches = launches_of(gpu, shape, registers)
    rows = []
    for role, launch in launches.items():
        blocks, warps = launch.grid[0], launch.block[0] // 32
        segments = launches[main[role.call]].grid[0] // (shape.B * shape.H)
        at = {name: x.at(length(role, shape, segments)) for name, x in lines[role].items()}
        instructions = at["PTX instructions"] * codes[role].per_ptx
        alone = instructions / warps * codes[role].cycles
        work = speed.Work(warps, instructions, at["wavefronts"], at["tensor flops"], alone)
        room = codes[role].kernel.occupancy(launch.block[0], launch.shared).blocks
        dram = at["DRAM bytes"] * blocks
        found = speed.predict(gpu, work, blocks, room, dram)
        floor = dram / (gpu.bandwidth * 1e3)
        times = found.seconds * 1e6, found.limit, found.blocks, found.waves, floor
        rows.append(Row(role, *times))
    return rows


def totals(gpu: speed.Gpu, shape: Shape) -> tuple[float, float]:
    """Of a forward, and with its backward."""
    rows = predicted(gpu, shape)
    forward = sum(row.predicted for row in rows if row.role.call == "forward")
    return forward, sum(row.predicted for row in rows)


# ---- tables ----


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 9.95 or x == 0 else f"{x:.1f}"


def work_table(arch: str) -> str:
    rows = []
    for N in sorted({shape.N for shape in MEASURED}):
        for role, lines in counted(N).items():
            if not re.search("chunked|walk", role.name) or role.purpose == "state_walk, forth":
                continue
            code = code_of(role.kernel, arch)
            ptx, wavefronts, conflicts, flops, _ = (CHUNK * lines[name].each for name in COUNTS)
            cells = [ptx, ptx * code.per_ptx, wavefronts, conflicts, flops / 1e3]
            rows.append([f"{role.purpose}, {N}", *map(number, cells), f"{code.cycles:.2f}"])
    columns = "PTX instr.", "machine instr.", "wavefronts", "conflicts", "mma kflop", "cycles each"
    return table([f"kernel, N, sm_{arch}", *columns], rows)


def kernels_table(gpu: speed.Gpu) -> str:
    """Kernel by kernel at every shape."""
    cells: dict[Role, dict[Shape, str]] = {}
    for shape in MEASURED:
        for row in predicted(gpu, shape):
            # the same launch, whatever the head size
            role = replace(row.role, kernel=row.role.kernel.replace(f"Li{shape.N}", "LiN"))
            waves = f" x {row.waves}" if row.waves > 1 else ""
            text = f"{number(row.predicted)} ({number(row.floor)}), {row.limit}, {row.blocks_each}"
            cells.setdefault(role, {})[shape] = text + waves
    rows = [
        [f"{role.call}: {role.purpose}", *(found.get(shape, "") for shape in MEASURED)]
        for role, found in cells.items()
    ]
    return table([gpu.name, *(", ".join(map(str, shape)) for shape in MEASURED)], rows)


def comparison() -> str:
    """With what an H200 and an H100 took."""
    gpu, rows, first = speed.GPUS["90"], [], next(iter(MEASURED))
    for shape, measured in MEASURED.items():
        cells = [", ".join(map(str, shape))]
        for i, time in enumerate(totals(gpu, shape)):
            cells.append(number(time))
            cells += [f"{number(m[i])}: {time / m[i]:.2f}" for m in measured.values()]
        rows.append(cells)
    gpus = list(MEASURED[first])
    calls = table(["B, T, H, N", "forward", *gpus, "forward + backward", *gpus], rows)
    times: dict[str, float] = dict.fromkeys(MEASURED_KERNELS, 0.0)
    for row in predicted(gpu, first):
        times[row.role.name] += row.predicted
    kernels = [
        [name, number(times[name]), number(m), f"{times[name] / m:.2f}"]
        for name, m in MEASURED_KERNELS.items()
    ]
    title = ", ".join(map(str, first)) + ", kernels"
    return calls + "\n\n" + table([title, "predicted", "measured", "ratio"], kernels)


def other_gpus(gpus: Sequence[speed.Gpu]) -> str:
    rows = []
    for gpu in gpus:
        cells = [" / ".join(map(number, totals(gpu, shape))) for shape in MEASURED]
        rows.append([f"{gpu.name} ({gpu.arch[:-1]}.{gpu.arch[-1]})", *cells])
    return table(
        ["forward / forward + backward", *(", ".join(map(str, s)) for s in MEASURED)], rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", nargs="+", default=list(speed.GPUS), choices=list(speed.GPUS))
    parser.add_argument("--write", action="store_true", help="into docs/cuda.md")
    arguments = parser.parse_args(argv)
    gpus = [speed.GPUS[arch] for arch in arguments.arch]
    tables = [work_table("90"), comparison(), other_gpus(gpus)]
    if arguments.write:
        tables.insert(1, kernels_table(speed.GPUS["90"]))
        before, after = (
            PAGE.read_text("utf-8").split(marker)[i] for i, marker in enumerate(MARKERS)
        )
        text = "\n\n".join([before + MARKERS[0], *tables, MARKERS[1] + after])
        PAGE.write_text(text, "utf-8")
    else:
        print(*tables, *map(kernels_table, gpus), sep="\n\n")


if __name__ == "__main__":
    main()
