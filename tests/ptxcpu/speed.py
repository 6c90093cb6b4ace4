"""How long a kernel takes on a GPU that is not there: from what it was counted to do (interpreter)
and from its machine code (sass).

No number here is fitted to a measured time of a kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from . import sass

SCHEDULERS = 4  # of a multiprocessor, on every architecture here; each issues one instruction


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str  # "90"
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # of DRAM, GB/s
    tensor_flops: int  # of mma.sync with 16-bit operands: of a multiprocessor, a cycle


# One GPU of each architecture, by NVIDIA's data sheets and architecture white papers. The clock is
# the sheet's float32 rate by its CUDA cores, the tensor cores' rate that for dense bfloat16 by
# multiprocessors and clock. Two exceptions: Hopper's mma.sync reaches 0.63 of that rate, which is
# wgmma's (Luo et al. 2024, arXiv:2402.13499); B200's, of tcgen05, says nothing about mma.sync,
# which is taken to be as fast as an A100's.
GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("A100", "80", 108, 1.410, 2039, 2048),
        Gpu("A40", "86", 84, 1.740, 696, 1024),
        Gpu("L40S", "89", 142, 2.520, 864, 1024),
        Gpu("H200", "90", 132, 1.980, 4800, 2580),
        Gpu("B200", "100", 148, 1.980, 8000, 2048),
        Gpu("RTX 5090", "120", 170, 2.407, 1792, 512),
    )
}

# Cycles until a result can be used, about what microbenchmarks of these architectures find (Luo et
# al. 2024; Sun et al. 2022, arXiv:2206.02874, for HMMA) or, if they do not list it, assumed; the
# same for all architectures. Global memory as it comes from L2.
LATENCIES = {
    "LDS": 29, "LDSM": 33, "STS": 20, "SHFL": 25, "MUFU": 22, "LDC": 35, "S2R": 30, "S2UR": 30,
    "R2UR": 12, "VOTE": 20, "LDG": 270, "STG": 20, "LDGSTS": 20, "LDL": 40, "STL": 20, "HMMA": 25,
}  # fmt: skip
OTHER_LATENCY = 30  # of what is waited for and not listed
OPERANDS_READ = 14  # cycles until an instruction has read its registers, which may change then
BARRIER = 20  # from the last warp's arrival on


def alone_cycles(instructions: Sequence[sass.Instruction]) -> float:
    """What one warp takes for the instructions if nothing else holds it up.

    Of copies of cp.async none is waited for: they were started a turn earlier.
    """
    time = 0
    scoreboards = [0] * 6  # when what is waited for there is done
    sums: dict[str, int] = {}  # when HMMA's results can be added to, by register
    for each in instructions:
        kind = each.opcode.split(".")[0]
        latency = LATENCIES.get(kind, OTHER_LATENCY)
        time = max([time, *(scoreboards[i] for i in range(6) if each.waits >> i & 1)])
        if kind == "HMMA":
            to, *_, added = re.findall(r"\bR\w+", each.operands)
            time = max(time, sums.get(added, 0))
            sums[to] = time + latency
        elif kind == "BAR":
            time += BARRIER
        if each.done is not None:
            scoreboards[each.done] = max(scoreboards[each.done], time + latency)
        if each.read is not None:
            scoreboards[each.read] = max(scoreboards[each.read], time + OPERANDS_READ)
        time += max(each.stall, 1)
    return time


@dataclass(frozen=True)
class Work:
    """What a block does."""

    warps: int
    instructions: float  # of all warps
    wavefronts: float  # cycles of shared memory
    tensor_flops: float  # on tensor cores, as if all operands had 16 bits
    alone_cycles: float  # what a warp takes by itself


def times_in(gpu: Gpu, work: Work, blocks: int) -> dict[str, float]:
    """Where a warp spends its cycles while a multiprocessor holds so many blocks.

    The warps of a scheduler queue for its issue slots, its tensor core and a quarter of shared
    memory, and otherwise wait for results at the same time: mean value analysis, which knows how
    much each needs but not in which order.
    """
    needs = {
        "issue": work.instructions / work.warps,
        "shared memory": work.wavefronts / work.warps * SCHEDULERS,
        "tensor cores": work.tensor_flops / work.warps * SCHEDULERS / gpu.tensor_flops,
    }
    waits = work.alone_cycles - needs["issue"]
    queues = dict.fromkeys(needs, 0.0)  # how many warps are there when one more comes
    times: dict[str, float] = {}
    for warps in range(1, math.ceil(blocks * work.warps / SCHEDULERS) + 1):
        times = {part: need * (1 + queues[part]) for part, need in needs.items()}
        times["latency"] = waits
        queues = {part: warps * times[part] / sum(times.values()) for part in needs}
    return times


@dataclass(frozen=True)
class Prediction:
    """Of a launch."""

    seconds: float
    limit: str  # what most of them are spent on: a key of times_in, or "DRAM"
    waves: int
    blocks: int  # of a multiprocessor, in the first wave


def predict(gpu: Gpu, work: Work, blocks: int, blocks_each: int, dram_bytes: float) -> Prediction:
    """Of a launch of `blocks` blocks, of which a multiprocessor has room for blocks_each."""
    room = blocks_each * gpu.multiprocessors
    waves = math.ceil(blocks / room)
    last_each = math.ceil((blocks - (waves - 1) * room) / gpu.multiprocessors)
    first_each = blocks_each if waves > 1 else last_each
    first, last = (times_in(gpu, work, each) for each in (first_each, last_each))
    cycles = (waves - 1) * sum(first.values()) + sum(last.values())
    seconds, dram = cycles / (gpu.clock * 1e9), dram_bytes / (gpu.bandwidth * 1e9)
    limit = "DRAM" if dram > seconds else max(first, key=first.__getitem__)
    return Prediction(max(seconds, dram), limit, waves, first_each)
