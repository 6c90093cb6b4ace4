"""Starting workers (worker.py) and asking them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contenders import REQUIREMENTS, Contender

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds for an answer, compiling included


class Dropout(Exception):  # noqa: N818
    """The contender does not take part; the message says why."""

    def __init__(self, reason: str, *, declined: bool = False) -> None:
        super().__init__(reason)
        self.declined = declined  # it says so itself; otherwise something went wrong


class Worker:
    """The process of one contender, with the packages installed for it first on its path."""

    def __init__(self, contender: Contender, threads: int, rivals: Path, log: Path) -> None:
        self.log = log
        package = contender.package
        self.install = (
            f'pip install --target {rivals / package} "{REQUIREMENTS[package]}"' if package else ""
        )
        paths = [str(rivals.absolute() / package)] if package else []
        paths += [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": str(threads),
        }
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", contender.target, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | environment | dict(contender.environment),
            )

    def ask(self, **message: Any) -> dict[str, Any]:
        """The worker's answer. Raises Dropout if there is none or it is a refusal."""
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
                self.process.kill()
                raise Dropout(f"no answer within {PATIENCE} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = (self.log.read_text(errors="replace").strip().split("\n") or [""])[-1]
            raise Dropout(f"ended with exit code {self.process.wait()}: {last[:200]}")
        answer = json.loads(line)
        if "missing" in answer:
            raise Dropout(f"not installed: {self.install or answer['missing']}")
        if "unsupported" in answer:
            raise Dropout(answer["unsupported"], declined=True)
        if "failed" in answer:
            raise Dropout(answer["failed"])
        return answer

    def forget(self) -> None:
        """Frees the memory of its jobs."""
        with contextlib.suppress(Dropout):
            self.ask(forget=True)

    def close(self) -> None:
        """Asks it to end; `wait` waits until it has."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()

    def wait(self) -> None:
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
