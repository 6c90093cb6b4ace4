"""examples/long_context.py: of a sequence each of four processes has a quarter."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
import torch.distributed.fsdp  # before the processes are forked

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # as running a script does
import long_context  # noqa: E402

SECONDS = 120  # for all cases of the launch
PROCESSES = 4
TEXT = ROOT / "README.md"
LENGTH = 2048


def run(*options: str) -> tuple[int, str, str]:
    """The exit code, and what this process writes to stdout and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = long_context.main(["--data", str(TEXT), "--length", str(LENGTH), *options])
    return code, out.getvalue(), err.getvalue()


def a_quarter_of_the_memory() -> None:
    code, out, _ = run("--steps", "2", "--check", "--grad-cp")
    assert code == 0
    if dist.get_rank() > 0:
        assert out == ""
        return
    first, last = map(float, re.findall(r"^step \d: loss ([\d.]+)$", out, re.M))
    assert last < first - 0.5
    (one,) = re.findall(r"^one process: loss ([\d.]+), ([\d.]+) MiB$", out, re.M)
    (each,) = re.findall(
        r"^each of 4: loss ([\d.]+), ([\d.]+) MiB at most, gradient off by ([\d.e+-]+)$", out, re.M
    )
    (loss, whole), (mean, quarter, off) = map(float, one), map(float, each)
    assert mean == pytest.approx(loss, rel=1e-5)
    assert off < 1e-5
    assert quarter < 0.3 * whole

    model = long_context.new_model(SimpleNamespace(seed=0, grad_cp=False))
    text = torch.tensor([list(TEXT.read_bytes()[: LENGTH + 1])])
    expected, everything = long_context.measured(model, text[:, :-1], text[:, 1:])
    assert first == pytest.approx(expected, rel=1e-5)
    assert whole < 0.7 * everything


def refused() -> None:
    for options, message in (
        (["--length", "2047"], "--length: expected a multiple of 4 processes, got 2047"),
        (["--length", "4000000"], r"--length: expected less than the text's \d+, got 4000000"),
    ):
        code, out, err = run(*options)
        assert (code, out) == (2, "")
        assert re.fullmatch(f"long_context.py: error: {message}\n", err)


CASES: dict[int, dict[str, Callable[[], None]]] = {
    PROCESSES: {f.__name__: f for f in (a_quarter_of_the_memory, refused)}
}


@pytest.mark.parametrize("name", CASES[PROCESSES])
def test_over_processes(name: str, errors: dict[int, dict[str, str]]) -> None:
    assert not errors[PROCESSES][name], errors[PROCESSES][name]
