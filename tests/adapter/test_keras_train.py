"""examples/keras_train.py on this backend, small."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backend import BACKEND, DIFFERENTIABLE

pytest.importorskip("matplotlib", reason="the examples need torch_rwkv6[examples]")
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SMALL = ["--epochs", "3", "--steps", "6", "--batch-size", "4", "--length", "16"]
SMALL += ["--n-layer", "1", "--n-embd", "16", "--head-size", "8"]


def run(*arguments):
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "keras_train.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


@pytest.mark.skipif(not DIFFERENTIABLE, reason="no training on this backend")
def test_it_learns_and_a_second_run_starts_from_the_same_weights(tmp_path):
    text = tmp_path / "text"
    text.write_text("one two three four five six seven eight nine ten\n" * 100)
    losses = []
    for _ in range(2):
        done = run("--data", text, "--out", tmp_path / "out", *SMALL)
        assert done.returncode == 0, done.stderr
        assert "bits per byte on unseen text" in done.stdout
        with (tmp_path / f"out/{BACKEND}.csv").open(newline="") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[0][2] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"out/{BACKEND}.keras").exists()


def test_errors_are_one_line(tmp_path):
    done = run("--data", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("keras_train.py: error: ")
