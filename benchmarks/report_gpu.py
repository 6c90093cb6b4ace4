"""One file about an NVIDIA GPU: what it is, what is right on it and how fast that is.

Every part is a process of its own with a time limit, so that the report goes on after a failure, a
crash or a hang; it ends with exit code 1 if any part failed. `make report-gpu` builds first.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
SANITIZER = "compute-sanitizer"
SANITIZED = [PYTHON, "-m", "benchmarks.gpu_check", "small"]
JAX_TESTS = [
    f"tests/adapter/test_{name}.py" for name in ("operator", "wkv", "jax_transforms", "nonfinite")
]
LAST_LINES = 60  # of a part's output that are shown


@dataclass(frozen=True)
class Part:
    """A heading of the report, and the command whose output stands below it."""

    title: str
    command: Sequence[str]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()  # modules without which it is left out

    def missing(self) -> str | None:
        """What must be installed before this part can run."""
        if shutil.which(self.command[0]) is None:
            return self.command[0]
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)


def parts(short: bool) -> list[Part]:
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    sanitized = ("memcheck",) if short else ("memcheck", "racecheck", "synccheck", "initcheck")
    jax = {"KERAS_BACKEND": "jax", "OPS_KERNEL": "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    adapter = ["-p", "no:xdist", "--confcutdir=tests/adapter"]
    return [
        Part("The card", [PYTHON, "-m", "benchmarks.gpu_check", "card"], 2),
        Part("Every kernel against float64", [PYTHON, "-m", "benchmarks.gpu_check", "matrix"], 5),
        *(
            Part(f"compute-sanitizer, {tool}", [SANITIZER, "--tool", tool, *SANITIZED], 10)
            for tool in sanitized
        ),
        Part("The operator's tests", [*pytest, "--device", "cuda"], 40),
        Part("Keras and JAX", [*pytest, *adapter, *JAX_TESTS], 20, jax, ("keras", "jax")),
        Part(
            "Speed",
            [PYTHON, "-m", "benchmarks", "gpu", *(["--short"] if short else [])],
            60,
        ),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--file",
        type=Path,
        default=Path("build/gpu-report.md"),
        help="what is written (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    failed = write(args.file, parts(args.short))
    print(f"\nwritten: {args.file}")
    if failed:
        sys.exit(f"report-gpu: {len(failed)} failed: {', '.join(failed)}")


def write(file: Path, every: Sequence[Part]) -> list[str]:
    """Runs the parts in turn and writes what each of them said. Returns the titles that failed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    with open(file, "w") as report:
        for part in every:
            print(f"== {part.title}", flush=True)
            outcome, output, right = _outcome(part)
            if not right:
                failed.append(part.title)
            print(output, f"-- {outcome}", sep="\n", flush=True)
            report.write(f"## {part.title}\n\n{outcome}\n\n")
            if output:
                report.write(f"```\n{output}\n```\n\n")
            report.flush()  # an interrupted report holds what was found before
    return failed


def _outcome(part: Part) -> tuple[str, str, bool]:
    """One line, the end of the output, and whether nothing is wrong."""
    if missing := part.missing():
        return f"Left out: {missing} is not installed.", "", True
    start = time.monotonic()
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | part.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that a time limit ends what the command started as well
    )
    try:
        output, _ = process.communicate(timeout=part.minutes * 60)
        outcome = "Passed" if process.returncode == 0 else f"FAILED, exit code {process.returncode}"
    except BaseException as reason:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        outcome = f"FAILED, stopped after {part.minutes:g} minutes"
    lines = output.rstrip().split("\n")
    if len(lines) > LAST_LINES:
        lines = [f"({len(lines) - LAST_LINES} lines before)", *lines[-LAST_LINES:]]
    seconds = time.monotonic() - start
    return f"{outcome}, {seconds:.0f} s.", "\n".join(lines), outcome == "Passed"
