"""The process of a contender: reads one JSON message per line and answers each with one.

    {"prepare": {work}, "job": number, "inputs": folder, "results": folder}
                                   -> {"version", "peak_bytes"}, files NAME.npy in results
    {"run": calls, "job": number}  -> {"elapsed", "seconds": for doing the work once}
    {"forget": true}               -> {}, and every job's memory is free

or with {"unsupported" | "missing" | "failed": reason}. Separate processes keep packages from
clashing and contenders from sharing threads, memory and settings. The process ends when its
standard input does. Run by workers.py:

    python -m benchmarks.worker module:function threads
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import peak, reset_peak
from benchmarks.timing import wall_clock
from benchmarks.work import Job, UnsupportedError, Work


def main(target: str, threads: int) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps what libraries print out of the answers
    if hasattr(os, "sched_setaffinity"):  # the same cores for all; the only thing XLA listens to
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    _limit_memory()
    prepare = _load(target)
    jobs: dict[int, Job] = {}
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "prepare" in message:
                jobs.pop(message["job"], None)  # frees its memory first
                jobs[message["job"]], answer = _prepare(prepare, message, threads)
            elif "run" in message:
                answer = _run(jobs[message["job"]], message["run"])
            else:
                jobs.clear()
                answer = {}
        except UnsupportedError as error:
            answer = {"unsupported": str(error)}
        except ModuleNotFoundError as error:
            answer = {"missing": error.name or str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(answer), file=answers)


def _limit_memory() -> None:
    """To half of the machine's, so that a contender that needs more fails alone. Linux only."""
    if sys.platform == "linux":
        import resource

        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        resource.setrlimit(resource.RLIMIT_DATA, (half, half))


def _load(target: str) -> Callable[[Work, dict[str, np.ndarray], int], Job]:
    """The contender's function; one that raises what importing it raised."""
    module, _, function = target.partition(":")
    try:
        return getattr(importlib.import_module(f"benchmarks.contenders.{module}"), function)
    except Exception as error:
        reason = error

        def fails(*_: object) -> Job:
            raise reason

        return fails


def _prepare(prepare: Any, message: dict[str, Any], threads: int) -> tuple[Job, dict[str, Any]]:
    base = reset_peak()
    inputs = {file.stem: np.load(file) for file in Path(message["inputs"]).glob("*.npy")}
    job = prepare(Work(**message["prepare"]), inputs, threads)
    results = job.call()  # compiles, where the contender does, and warms up
    most = peak()
    # Linux counts pages in batches, so the need of a small call may not show.
    needed = most - base if most is not None and base is not None and base < most else None
    answer = {"version": job.version, "peak_bytes": needed}
    if job.arrays is not None:
        for name, a in job.arrays(results).items():
            np.save(Path(message["results"]) / name, a)
    return job, answer


def _run(job: Job, calls: int) -> dict[str, float]:
    seconds = wall_clock(job.call, calls)
    return {"elapsed": seconds * calls, "seconds": seconds / job.repeats}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    os._exit(0)  # to take a package with its threads and compilers apart takes seconds
