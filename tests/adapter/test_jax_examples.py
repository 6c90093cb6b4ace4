"""The example programs of JAX, small."""

import pytest
from example import run


def test_shard_map(capsys):
    pytest.importorskip("jax", minversion="0.8")
    assert (
        run("jax_shard_map.py", *["--batch-size", "1", "--num-heads", "1", "--seq-length", "8"])
        == 0
    )
    out = capsys.readouterr().out
    assert "(8, 1, 8, 64)" in out
    assert "(8, 8, 64)" in out
    assert "(1, 64, 1, 64)" in out
    assert "all equal the results of one device" in out


def test_training_on_a_mesh(capsys):
    pytest.importorskip("optax")
    assert run("jax_train_sharded.py", *["--steps", "40", "--length", "32"]) == 0
    out = capsys.readouterr().out
    assert "mesh {'data': 4, 'model': 2}; WKV of one device: f32[4,32,2,16]" in out
    first, last = out.splitlines()[-1].removeprefix("loss ").split(" -> ")
    assert float(last) < 0.6 * float(first)


def test_keras_distribution(capsys):
    assert run("keras_distribution.py") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "8 devices",
        "one device",
        "DataParallel",
        "ModelParallel",
    ]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("jax_train_sharded.py", ["--steps", "0"], "--steps: expected an integer of at least 1"),
        ("jax_train_sharded.py", ["--length", "99999"], "--length: expected an integer of at most"),
        ("jax_train_sharded.py", ["--batch-size", "3"], "--batch-size: expected a multiple of 4"),
        ("jax_shard_map.py", ["--head-size", "-1"], "--head-size: expected an integer of at least"),
        ("keras_distribution.py", ["--seed", "x"], "--seed: expected an integer of at least 0"),
    ],
)
def test_errors_are_one_line(script, arguments, message, capsys):
    if script == "jax_train_sharded.py":
        pytest.importorskip("optax")
    assert run(script, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}: error: ")
    assert message in line
