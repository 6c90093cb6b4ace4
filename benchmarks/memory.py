"""The memory that this process needs for a while. Linux only. Imports no framework."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


def reset_peak() -> int | None:
    """Sets the peak of this process's memory to what it has now, in bytes, and returns that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak()


def peak() -> int | None:
    """The most memory this process has had since `reset_peak`, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")
    )


def available() -> int | None:
    """What the system could still give to programs, in bytes."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def give_back() -> None:
    """Gives freed memory that the C library still holds back to the system, where it is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
