"""examples/keras_train.py on this backend, small."""

import csv

import pytest
from backend import BACKEND, DIFFERENTIABLE
from example import run

pytest.importorskip("matplotlib", reason="the examples need torch_rwkv6[examples]")
SMALL = [
    "--epochs",
    "2",
    "--steps",
    "8",
    "--batch-size",
    "4",
    "--length",
    "8",
    "--n-layer",
    "1",
    "--n-embd",
    "16",
    "--head-size",
    "8",
]


@pytest.mark.skipif(not DIFFERENTIABLE, reason="no training on this backend")
def test_it_learns_and_a_second_run_starts_from_the_same_weights(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("one two three four five six seven eight nine ten\n" * 100)
    losses = []
    for _ in range(2 if BACKEND == "torch" else 1):  # the others take long to compile
        assert run("keras_train.py", "--data", text, "--out", tmp_path / "out", *SMALL) == 0
        assert "bits per byte on unseen text" in capsys.readouterr().out
        with (tmp_path / f"out/{BACKEND}.csv").open(newline="") as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
        assert losses[-1][1] < losses[-1][0]
    assert losses[0] == pytest.approx(losses[-1], rel=1e-3)
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / f"out/{BACKEND}.keras").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none"], "--data: no such file: none"),
        (["--data", "five"], "the text has 5 bytes: too few for --length 64"),
        (["--epochs", "0"], "--epochs: expected an integer of at least 1, got '0'"),
        (["--batch-size", "-1"], "--batch-size: expected an integer of at least 1, got '-1'"),
        (["--n-embd", "nan"], "--n-embd: expected an integer of at least 1, got 'nan'"),
        (["--seed", "-1"], "--seed: expected an integer of at least 0, got '-1'"),
        (["--out", "five"], "--out: cannot be written"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "five").write_bytes(b"hello")
    assert run("keras_train.py", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("keras_train.py: error: ")
    assert message in line
