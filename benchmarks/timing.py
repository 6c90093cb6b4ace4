"""Interleaved timing: contenders take turns, so changes of the machine's speed affect all alike.

It imports no framework, so that the processes of contenders (worker.py) can use the same clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Call = Callable[[], object]


def wall_clock(call: Call, repeats: int = 1) -> float:
    """Seconds of a call, the mean of ``repeats``."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cpu_clock(call: Call, repeats: int = 1) -> float:
    """The same in the time that the processor worked for this process."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def gpu_clock(call: Call, repeats: int = 1) -> float:
    """The same between two events of the GPU's current stream."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def interleave(
    contenders: Mapping[str, Call],
    rounds: int,
    clock: Callable[[Call, int], float] = wall_clock,
    turn: float = 0.0,
) -> dict[str, tuple[float, float]]:
    """Minimum and median seconds of each contender over `rounds` turns, after one to warm up.

    A call that is shorter than `turn` seconds is repeated to fill a turn.
    """
    repeats = {name: max(1, round(turn / clock(call, 1))) for name, call in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            seconds[name].append(clock(call, repeats[name]))
    return {name: (min(s), statistics.median(s)) for name, s in seconds.items()}
