"""The report about a GPU goes on after failures, and calls wrong what is wrong. Needs no GPU."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is not installed
from benchmarks import __main__ as command_line  # noqa: E402
from benchmarks import gpu, gpu_check, report_gpu  # noqa: E402
from benchmarks.report_gpu import Part  # noqa: E402
from benchmarks.work import Work  # noqa: E402
from torch_rwkv6 import reference, wkv  # noqa: E402


def python(title: str, code: str, minutes: float = 1.0, **options) -> Part:
    return Part(title, [sys.executable, "-c", code], minutes, **options)


def test_goes_on_after_failures(tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.md"
    lines = report_gpu.LAST_LINES + 5
    failed = report_gpu.write(
        file,
        [
            python("right", "import os; print('a' + os.environ['B'])", environment={"B": "bc"}),
            python("wrong", "raise SystemExit('the reason')"),
            python("crash", "import os; print('last words', flush=True); os.abort()"),
            python("long", f"print(*range({lines}), sep='\\n')"),
            Part("no program", ["no-such-program"], 1),
            python("no module", "", needs=("torch", "no_such_module")),
            python("bytes", r"import sys; sys.stdout.buffer.write(b'\xff')"),
        ],
    )
    assert failed == ["wrong", "crash"]
    _, *parts = file.read_text().split("## ")
    right, wrong, crash, long, no_program, no_module, _ = parts
    assert right.startswith("right\n\nPassed, ")
    assert "```\nabc\n```" in right
    assert "FAILED, exit code 1" in wrong
    assert "the reason" in wrong
    assert "FAILED, exit code -6" in crash
    assert "last words" in crash
    assert "(5 lines before)\n5\n6\n" in long
    assert f"\n{lines - 1}\n" in long
    assert no_program == "no program\n\nLeft out: no-such-program is not installed.\n\n"
    assert no_module == "no module\n\nLeft out: no_such_module is not installed.\n\n"


def test_a_part_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; print('begun', flush=True); "
    child += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    file = tmp_path / "report.md"
    start = time.monotonic()
    parts = [python("hangs", child, minutes=0.05), python("next", "print('still here')")]
    assert report_gpu.write(file, parts) == ["hangs"]
    assert time.monotonic() - start < 300  # its child holds the pipe open for 600
    assert "FAILED, stopped after 0.05 minutes" in file.read_text()
    assert "begun" in file.read_text()
    assert "still here" in file.read_text()


def test_the_command_says_what_failed(tmp_path: Path, monkeypatch, capsys) -> None:
    asked = []

    def parts(short: bool) -> list[Part]:
        asked.append(short)
        return [python("odd", "raise SystemExit(2)"), python("even", "")]

    monkeypatch.setattr(report_gpu, "parts", parts)
    file = tmp_path / "report.md"
    with pytest.raises(SystemExit, match="report-gpu: 1 failed: odd"):
        command_line.main(["report-gpu", "--short", "--file", str(file)])
    assert asked == [True]
    assert f"written: {file}" in capsys.readouterr().out


@pytest.mark.parametrize("short", [True, False])
def test_every_part_names_files_that_exist(short: bool) -> None:
    parts = report_gpu.parts(short)
    assert len({part.title for part in parts}) == len(parts)
    for part in parts:
        for word in part.command:
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), word


@pytest.fixture
def few_kernels(monkeypatch) -> None:
    """The matrix computed on the CPU, which has one family and pays no heed to its name."""
    kernels = [("recurrent", 5, torch.float32), ("chunked", 32, torch.bfloat16)]
    monkeypatch.setattr(gpu_check, "_kernels", lambda: iter(kernels))
    monkeypatch.setattr(gpu_check, "large", list)
    monkeypatch.setattr(gpu_check, "REPEATS", 2)


def test_the_matrix_of_right_kernels(few_kernels, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        gpu_check.matrix()
    assert not end.value.code
    assert capsys.readouterr().out.endswith("all right\n")


def nan(y, state):
    return y * math.nan, state


@pytest.mark.parametrize("broken", [lambda y, s: (y * 1.01, s), lambda y, s: (y, s + 0.01), nan])
def test_the_matrix_of_a_wrong_kernel(few_kernels, broken, monkeypatch, capsys) -> None:
    function = gpu_check._forward_and_backward

    def wrong(inputs, wkv=lambda *x: broken(*wkv(*x))):
        return function(inputs, wkv)

    monkeypatch.setattr(gpu_check, "_forward_and_backward", wrong)
    with pytest.raises(SystemExit) as end:
        gpu_check.matrix()
    assert end.value.code
    assert "recurrent, float32, N 5: error above 5.0e-06" in capsys.readouterr().out


def test_the_matrix_of_kernels_that_differ_from_call_to_call(
    few_kernels, monkeypatch, capsys
) -> None:
    function, calls = gpu_check._forward_and_backward, []

    def unsteady(inputs, *wkv):
        calls.append(1)
        y, *others = function(inputs, *wkv)
        return y + 1e-6 * len(calls), *others

    monkeypatch.setattr(gpu_check, "_forward_and_backward", unsteady)
    with pytest.raises(SystemExit):
        gpu_check.matrix()
    assert "recurrent, float32, N 5: 2 repeats differ" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["swim"], ["card", "small"]], ids=str)
def test_bad_arguments(arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch_rwkv6, "has_cuda_kernels", True)
    with pytest.raises(SystemExit, match="gpu_check: expected one of card, small, matrix, got"):
        gpu_check.main(arguments)


FORWARD = Work("forward", 2, 40, 3, 16)


@pytest.mark.parametrize("kind", ["forward", "forward + backward", "decode"])
def test_contenders_are_compared_with_float64(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    work = replace(FORWARD, kind=kind, T=1 if kind == "decode" else FORWARD.T)
    exact = gpu._exact(work)
    assert all(x.dtype == torch.float64 for x in exact)
    assert gpu._error(work, "", wkv, exact) < 1e-6
    assert gpu._error(work, "", reference.wkv, exact) < 1e-6
    assert gpu._error(work, "", lambda *x: nan(*wkv(*x)), exact) == math.inf
    last = torch.zeros(work.T)[None, :, None, None]
    last[:, -1] = 1e-3  # one token wrong, the last
    assert gpu._error(work, "", lambda *x: (wkv(*x)[0] * (1 + last), wkv(*x)[1]), exact) > 1e-5


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        (
            "void rwkv6::cuda::(anonymous namespace)::forward_chunked<rwkv6::Bf16, 64>(Job)",
            "forward_chunked<Bf16, 64>",
        ),
        ("rwkv6::cuda::sum_parts(float const*)", "sum_parts"),
        (
            "void rwkv6::cuda::(anonymous namespace)::state_walk_kernel<rwkv6::Bf16, 64, (bool)1>"
            "(rwkv6::cuda::Walk, rwkv6::cuda::(anonymous namespace)::Results)",
            "state_walk_kernel<Bf16, 64, 1>",
        ),
        ("Memcpy DtoD", "Memcpy DtoD"),
    ],
)
def test_names_of_kernels(kernel: str, name: str) -> None:
    assert gpu._short(kernel) == name
