"""The example programs of JAX, as a user runs them, small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(script, *arguments, **environment):
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shard_map():
    pytest.importorskip("jax", minversion="0.8")
    out = run("jax_shard_map.py", "--batch-size", "1", "--num-heads", "1", "--seq-length", "8")
    assert "(8, 1, 8, 64)" in out
    assert "(8, 8, 64)" in out
    assert "both equal the result of one device" in out


def test_training_on_a_mesh():
    pytest.importorskip("optax")
    out = run("jax_train_sharded.py", "--steps", "40")
    assert "mesh {'data': 4, 'model': 2}; WKV of one device: f32[4,64,2,16]" in out
    first, last = out.splitlines()[-1].removeprefix("loss ").split(" -> ")
    assert float(last) < 0.6 * float(first)


def test_keras_distribution():
    lines = run("keras_distribution.py").splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "8 devices",
        "one device",
        "DataParallel",
        "ModelParallel",
    ]
