"""What the CUDA kernels do for a token of a head, counted while they run under ptxcpu.

    cd tests && python -m cuda.counts

Each figure is the difference of two lengths, so that what a call does once does not count. Traffic
is counted in bytes asked for and, as HBM's share of it, in distinct 32-byte sectors: what is read
again within a launch comes from the same block a few thousand cycles later, and from L2.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from samples import Call, random_call

from cuda.gpu import gpu

LENGTHS = 512, 1024
COUNTS = {
    "loads": ("global_load_bytes", 1),
    "stores": ("global_store_bytes", 1),
    "HBM read": ("footprint_read_sectors", 32),
    "HBM written": ("footprint_written_sectors", 32),
    "warp instr.": ("warp_instructions", 1),
    "flop": ("flops", 1),
    "mma flop": ("mma_flops", 1),
    "barriers": ("barriers", 1),
}


def launches(call: Call, kind: str) -> dict[str, dict[str, float]]:
    """The counts of each kernel of a call: forward, backward, decode or final state."""
    device = gpu()
    device.runtime.reset()
    with device.runtime.settings(check=0, footprint=1):
        if kind == "forward":
            device.forward(call)
        elif kind == "decode":
            device.update(call)
        elif kind == "final state":
            device.final_state(call)
        else:
            device.backward(call, *call.grad_outputs())
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for launch in device.runtime.launches():
        name = re.findall(r"(\w+)_kernel\b", launch.name)[0]
        for column, (statistic, unit) in COUNTS.items():
            totals[name][column] += launch.statistics[statistic] * unit
    return totals


def per_token(kind: str, dtype: torch.dtype, N: int) -> dict[str, dict[str, float]]:
    short, long = (launches(random_call(1, T, 1, N, dtype), kind) for T in LENGTHS)
    tokens = LENGTHS[1] - LENGTHS[0]
    return {
        kernel: {c: (counts[c] - short[kernel][c]) / tokens for c in COUNTS}
        for kernel, counts in long.items()
    }


def main() -> None:
    os.environ["RWKV6_CUDA_SEGMENT"] = str(2 * LENGTHS[1])  # one segment
    print(f"| dtype, N | kernel | {' | '.join(COUNTS)} |")
    print(f"|---|---|{'---:|' * len(COUNTS)}")
    for dtype, N in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)):
        kinds = ["forward", "backward"]
        if dtype == torch.float32:
            kinds.insert(1, "final state")  # state_sum, which segments take as well
        for kind in kinds:
            sums: dict[str, float] = defaultdict(float)
            for kernel, counts in per_token(kind, dtype, N).items():
                if counts["warp instr."] < 1:
                    continue  # sums over tokens and sequences
                row(dtype, N, kernel, counts)
                for column, count in counts.items():
                    sums[column] += count
            if kind == "backward":
                row(dtype, N, "backward, all", sums)
    for dtype in (torch.bfloat16, torch.float32):
        call = random_call(8, 1, 4, 64, dtype, states=8)
        (kernel, counts), *_ = launches(call, "decode").items()
        row(dtype, 64, f"decoding: {kernel}", {c: count / 32 for c, count in counts.items()})


def row(dtype: torch.dtype, N: int, kernel: str, counts: dict[str, float]) -> None:
    name = str(dtype).removeprefix("torch.")
    figures = " | ".join(
        f"{counts[c]:,.4g}" if counts[c] < 10 else f"{counts[c]:,.0f}" for c in COUNTS
    )
    print(f"| {name}, {N} | {kernel} | {figures} |")


if __name__ == "__main__":
    main()
