"""The machine's limits, raced like contenders: bandwidth and multiply-adds (limits.cpp)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.work import Arrays, Job, UnsupportedError, Work

SOURCE = Path(__file__).parents[1] / "limits.cpp"
BUILD = Path(__file__).parents[2] / "build" / "benchmarks"
PASSED_BYTES = 2**27  # about two milliseconds
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-pthread", "-shared", "-fPIC")


def build() -> ctypes.CDLL:
    """limits.cpp, compiled once for each state of its source."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = BUILD / f"limits-{key}.so"
    if not library.exists():
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            raise UnsupportedError("needs g++")
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / "limits.so"
            subprocess.run([compiler, *FLAGS, "-o", str(made), str(SOURCE)], check=True)
            made.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.limits_fma.restype = ctypes.c_float
    return loaded


def _aligned(count: int) -> np.ndarray:
    """`count` ones, float32, that begin where a cache line does."""
    line = 64 // 4
    whole = np.ones(count + line, np.float32)
    start = -whole.ctypes.data % 64 // 4
    return whole[start : start + count]


def stream(work: Work, inputs: Arrays, threads: int) -> Job:
    """Every tensor of the work read or written once, nothing computed."""
    library = build()
    reads, writes = work.streams
    count = work.tensor_bytes // 4
    sources = [_aligned(count) for _ in range(reads)]
    targets = [_aligned(count) for _ in range(writes)]
    addresses = [
        (ctypes.c_void_p * len(x))(*(a.ctypes.data for a in x)) for x in (sources, targets)
    ]

    def call(held: object = (sources, targets)) -> None:
        library.limits_stream(
            addresses[0], reads, addresses[1], writes, ctypes.c_int64(count), threads
        )

    return Job(call)


def state(work: Work, inputs: Arrays, threads: int) -> Job:
    """The state read and written once; many passes a call, for which threads start only once."""
    library = build()
    x = _aligned(inputs["state"].size)
    passes = max(1, PASSED_BYTES // work.state_bytes)

    def call() -> None:
        address = ctypes.c_void_p(x.ctypes.data)
        library.limits_state(
            address, ctypes.c_int64(x.size), ctypes.c_int64(passes), ctypes.c_float(1.0), threads
        )

    return Job(call, repeats=passes)


def fma(work: Work, inputs: Arrays, threads: int) -> Job:
    """2 N² multiply-adds for each token and head, the least that a chunked form needs."""
    library = build()
    count = 2 * work.N**2 * work.tokens

    def call() -> None:
        library.limits_fma(ctypes.c_int64(count), threads)

    return Job(call)
