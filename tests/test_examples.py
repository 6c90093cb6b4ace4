"""The example programs, run as a user runs them, on a tiny text."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the examples need torch_rwkv6[examples]")
pytest.importorskip("matplotlib", reason="the examples need torch_rwkv6[examples]")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # as running a script does
import generate  # noqa: E402
import train_lm  # noqa: E402

SMALL = ["--n-layer", "1", "--n-embd", "32", "--head-size", "16", "--lora-mix", "4"]
SMALL += ["--batch-size", "4", "--length", "16", "--val-every", "10"]


def run(script: str, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of the script in a process of its own, which must succeed."""
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8"), done.stderr.decode()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "zähl.txt"
    path.write_text("eins zwei drei vier fünf sechs sieben acht neun zehn\n" * 200, "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    report, _ = run("train_lm.py", "--data", str(text), "--out", str(out), "--steps", "30", *SMALL)
    for words in ("validation bits per character", "unigram", "bigram", "Sample:"):
        assert words in report
    return out


def losses(out: Path, version: int, name: str) -> dict[int, float]:
    with (out / f"log/version_{version}/metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def test_training_learns_and_writes_everything(trained: Path) -> None:
    bits = losses(trained, 0, "val_bits_per_char")
    assert list(bits) == [9, 19, 29]
    assert bits[29] < bits[9]
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights = torch.load(trained / "model.pth", weights_only=True)
    assert len(weights) == 28 + 6


def test_resuming_equals_not_having_stopped(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", str(text), "--out", str(tmp_path), "--steps", "30", *SMALL]
    trainer = train_lm.lightning.Trainer
    with monkeypatch.context() as patch:  # a run of 30 steps that is killed after 15
        patch.setattr(train_lm.lightning, "Trainer", lambda **kw: trainer(**kw | {"max_steps": 15}))
        assert train_lm.main(arguments) == 0
    # the settings of the model come from the checkpoint
    resume = ["--resume", str(tmp_path / "last.ckpt"), "--steps", "30", "--val-every", "10"]
    assert train_lm.main([*arguments[:4], *resume]) == 0
    for name in ("train_loss", "val_loss"):
        whole, resumed = losses(trained, 0, name), losses(tmp_path, 1, name)
        assert resumed[29] == pytest.approx(whole[29], rel=1e-4)


def test_bf16_and_a_time_limit(text: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(text), "--out", str(tmp_path), "--max-seconds", "1"]
    limit = ["--steps", "100000", "--precision", "bf16-mixed"]
    assert train_lm.main([*arguments, *SMALL, *limit]) == 0
    weights = torch.load(tmp_path / "model.pth", weights_only=True)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in weights.values())


def test_generation_is_reproducible(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "eins zwei für", "--length", "40"]
    first, figures = run("generate.py", str(trained / "model.pth"), *arguments)
    assert first.startswith("eins zwei für")
    assert "tokens/s" in figures
    assert "state 2.2 KiB" in figures  # 2 * 32 + 2 * 16 * 16 float32
    for file, seed, same in (("last.ckpt", "0", True), ("model.pth", "1", False)):
        assert generate.main([str(trained / file), *arguments, "--seed", seed]) == 0
        assert (capsys.readouterr().out == first) is same


def test_the_default_text_is_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train_lm.main([]) == 2
    assert "pip install torch_rwkv6[examples]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("generate.py", ["no-such.pth"], "no such file: no-such.pth"),
        ("generate.py", [__file__], "is no checkpoint"),
        ("train_lm.py", ["--data", "no-such.txt"], "no-such.txt"),
        ("train_lm.py", ["--data", __file__, "--resume", "no-such.ckpt"], "no-such.ckpt"),
        ("train_lm.py", ["--data", __file__, "--head-size", "7"], "head_size"),
        ("train_lm.py", ["--data", __file__, "--batch-size", "100000"], "too few"),
    ],
    ids=lambda x: " ".join(x).replace(__file__, "THIS") if isinstance(x, list) else "",
)
def test_errors_are_one_line(
    script: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = {"generate.py": generate.main, "train_lm.py": train_lm.main}[script]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{script}: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
