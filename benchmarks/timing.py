"""Interleaved timing: all contenders take turns, so that a machine's moods hit them alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping

import torch

import torch_rwkv6


def machine_line() -> str:
    """CPU, cores, instruction set and versions."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    return (
        f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torch_rwkv6 {torch_rwkv6.__version__}"
    )


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Minimum and median seconds of each contender over `rounds` turns, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: (min(s), sorted(s)[len(s) // 2]) for name, s in seconds.items()}
