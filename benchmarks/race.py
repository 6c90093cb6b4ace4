"""Contenders on the same tensors: each checked against float64, then timed turn by turn.

Because they take turns, changes of the machine's speed affect all of them alike: the ratios within
one race are more reliable than its times.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import Contender
from benchmarks.exact import checked_heads, exact, make_inputs, of_heads, relative_error
from benchmarks.work import Arrays, Work
from benchmarks.workers import Dropout, Worker

TURN = 0.02  # seconds: a turn is as many calls as fill it
MOST_TURNS = 30
MOST_CALLS = 100_000
PAUSE = 0.01  # between turns, so that spinning threads of the previous contender go to sleep
WRONG = 1e-2  # a contender with a larger error is not timed
EXTREME_TOKENS = 128  # of the check on extreme decays


@dataclass(frozen=True)
class Entrant:
    contender: Contender
    work: Work
    threads: int = 1


@dataclass
class Result:
    """The result of an entrant: seconds of each turn, or a note that says why there are none."""

    entrant: Entrant
    seconds: list[float] = field(default_factory=list)
    error: float | None = None  # relative RMS against float64; None: not checked (limits)
    extreme_error: float | None = None  # the same with extreme decays
    peak_bytes: int | None = None  # memory of inputs, one call and its results
    version: str = ""
    note: str = ""
    declined: bool = False

    @property
    def least(self) -> float | None:
        return min(self.seconds, default=None)

    def row(self, ours: Result | None) -> dict[str, Any]:
        """For tables and JSON; `ours` is what ratios are taken to."""
        work, seconds = self.entrant.work, self.least
        row: dict[str, Any] = {
            "contender": self.entrant.contender.label,
            "version": self.version,
            "threads": self.entrant.threads,
            **asdict(work),
            "turns": len(self.seconds),
            "error": self.error,
            "extreme_error": self.extreme_error,
            "peak_bytes": self.peak_bytes,
            "note": self.note,
        }
        if seconds is not None:
            per_token = 1e9 / work.tokens
            row["min_ns"] = seconds * per_token
            row["median_ns"] = statistics.median(self.seconds) * per_token
            if ours is not None and ours.least is not None:
                row["ratio"] = row["min_ns"] / (ours.least * 1e9 / ours.entrant.work.tokens)
            row["gb_per_s"] = work.traffic / seconds / 1e9
        return row


class Stable:
    """Workers, one for each program and number of threads, kept from race to race."""

    def __init__(self, rivals: Path) -> None:
        self.rivals = rivals
        self.workers: dict[tuple[object, ...], Worker] = {}

    def __enter__(self) -> Stable:
        self._folder = tempfile.TemporaryDirectory(prefix="torch_rwkv6-race-")
        self.folder = Path(self._folder.name)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
        for worker in self.workers.values():
            worker.wait()
        self._folder.cleanup()

    def worker(self, entrant: Entrant) -> Worker:
        contender = entrant.contender
        key = (contender.target, contender.environment, entrant.threads)
        if key not in self.workers:
            log = self.folder / f"{len(self.workers)}.log"
            self.workers[key] = Worker(contender, entrant.threads, self.rivals, log)
        return self.workers[key]

    def race(self, entrants: Sequence[Entrant], budget: float) -> list[Result]:
        """Results in the order of the entrants, each timed for about `budget` seconds.

        Raises:
            RuntimeError: torch_rwkv6 itself fails, or breaks its promise of accuracy.
        """
        results = [Result(entrant) for entrant in entrants]
        workers = [self.worker(entrant) for entrant in entrants]  # all start up side by side
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            desk = _Desk(Path(name))
            for i, (result, worker) in enumerate(zip(results, workers, strict=True)):
                try:
                    _check(result, worker, desk, i)
                except Dropout as reason:
                    result.note, result.declined = str(reason), reason.declined
                _judge_ours(result)
        lanes = [
            _Lane(result, worker, i)
            for i, (result, worker) in enumerate(zip(results, workers, strict=True))
            if not result.note
        ]
        _take_turns(lanes, budget)
        for worker in set(workers):
            worker.forget()
        return results


class _Desk:
    """Writes inputs to files, once for each work, and judges results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[Work, tuple[Path, Arrays]] = {}

    def of(self, work: Work) -> tuple[Path, Arrays]:
        """The folder of the inputs, and the exact results."""
        if work not in self.known:
            folder = self.folder / f"inputs{len(self.known)}"
            folder.mkdir()
            arrays = make_inputs(work)
            for name, a in arrays.items():
                np.save(folder / name, a)
            self.known[work] = folder, exact(work, arrays)
        return self.known[work]

    def check(self, worker: Worker, work: Work, job: int) -> tuple[float | None, dict[str, Any]]:
        """Lets the worker do the work once: its error (None for limits) and its answer."""
        inputs, expected = self.of(work)
        results = self.folder / "results"
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        answer = worker.ask(prepare=asdict(work), job=job, inputs=str(inputs), results=str(results))
        found = {file.stem: np.load(file) for file in results.glob("*.npy")}
        if not found:
            return None, answer
        return relative_error(of_heads(found, checked_heads(work)), expected), answer


def _check(result: Result, worker: Worker, desk: _Desk, job: int) -> None:
    work = result.entrant.work
    result.extreme_error, _ = desk.check(worker, work.small(tokens=EXTREME_TOKENS), job)
    result.error, answer = desk.check(worker, work, job)
    result.peak_bytes, result.version = answer["peak_bytes"], answer["version"]
    if result.error is not None and not result.error < WRONG:  # NaN as well
        raise Dropout(f"wrong: relative error {result.error:.1e}")


def _judge_ours(result: Result) -> None:
    """A failure of torch_rwkv6 is an error, unless the CPU lacks a forced instruction set."""
    contender, work = result.entrant.contender, result.entrant.work
    forced = result.note and contender.environment
    if not contender.ours or result.declined or forced:
        return
    errors = (result.error, result.extreme_error)
    if result.note or not all(e is not None and e <= work.promise for e in errors):
        raise RuntimeError(
            f"{contender.label}, {work.kind}, {work}: {result.note or 'checked'}; relative errors "
            f"{errors} against float64, promised {work.promise}"
        )


@dataclass
class _Lane:
    """An entrant during the race: its calls per turn and its number of turns."""

    result: Result
    worker: Worker
    job: int
    calls: int = 1
    turns: int = 1

    def turn(self) -> float:
        """Seconds that it took."""
        time.sleep(PAUSE)
        try:
            answer = self.worker.ask(run=self.calls, job=self.job)
        except Dropout as reason:
            self.result.note = str(reason)
            return TURN
        self.result.seconds.append(answer["seconds"])
        return answer["elapsed"]


def _take_turns(lanes: list[_Lane], budget: float) -> None:
    for lane in lanes:
        seconds = max(lane.turn(), 1e-9)
        lane.calls = max(1, min(MOST_CALLS, int(TURN / seconds)))
        lane.turns = max(1, min(MOST_TURNS, int(budget / (seconds * lane.calls))))
        if lane.calls > 1:  # the first turn was one call, so short that it is mostly the clock
            lane.result.seconds.clear()
            lane.turns = max(2, lane.turns)
    rounds = max((lane.turns for lane in lanes), default=0)
    for i in range(rounds):
        for lane in lanes:
            due = (i + 1) * lane.turns // rounds > i * lane.turns // rounds  # spread over the race
            if due and not lane.result.note:
                lane.turn()
