"""Environment variables and missing pieces, most in a process of their own."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from backend import BACKEND

import keras_adapter

ROOT = Path(keras_adapter.__file__).parent.parent


def run(code, cwd=ROOT, **environment):
    """stdout, stderr and exit status of a Python program."""
    paths = os.pathsep.join([str(cwd), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )


COMPUTE = """
import numpy as np, keras_adapter
x = np.ones((1, 2, 1, 1), "float32")
y, state = keras_adapter.ops.wkv(x, x, x, x, x[0, 0])
print(np.asarray(y.detach() if hasattr(y, "detach") else y).ravel()[0])
"""


@pytest.mark.skipif(BACKEND != "jax", reason="one backend says enough")
def test_ops_kernel_forces_the_high_level_implementation():
    done = run(COMPUTE + "print(keras_adapter.has_kernels)", OPS_KERNEL="1")
    assert done.stdout == "1.0\nFalse\n", done.stderr


@pytest.mark.skipif(BACKEND != "numpy", reason="one backend says enough")
def test_ops_kernel_takes_0_or_1():
    assert "OPS_KERNEL: expected 0 or 1, got 'yes'" in run(COMPUTE, OPS_KERNEL="yes").stderr


@pytest.mark.skipif(BACKEND != "numpy", reason="one backend says enough")
def test_pytorch_is_called_torch():
    done = run("import keras_adapter", KERAS_BACKEND="pytorch")
    assert done.returncode != 0
    assert "Keras calls its PyTorch backend 'torch', got 'pytorch'" in done.stderr


@pytest.mark.skipif(BACKEND not in ("jax", "tensorflow"), reason="has no XLA binding")
def test_without_the_binary_it_works_and_says_once_what_is_missing(tmp_path):
    package = ROOT / "keras_adapter"
    ignore = shutil.ignore_patterns("*.so")
    shutil.copytree(package, tmp_path / "keras_adapter", ignore=ignore)
    done = run(COMPUTE + "print(keras_adapter.has_kernels)", cwd=tmp_path)
    assert done.stdout == "1.0\nFalse\n", done.stderr
    assert done.stderr.count("the compiled XLA binding could not be loaded") == 1
    assert "does not exist" in done.stderr


@pytest.mark.skipif(BACKEND in ("torch", "numpy"), reason="the native kernels need torch here")
def test_torch_is_not_imported_and_no_compiler_is_looked_for():
    report = "import sys; print('torch' in sys.modules, 'torch_rwkv6' in sys.modules)"
    done = run(COMPUTE + report, PATH="", RWKV6_TF_NATIVE="1")
    assert done.stdout == "1.0\nFalse False\n", done.stderr


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own variable")
def test_rwkv6_tf_native(monkeypatch):
    """1 is in the test above, and in a run of test_adapter.py."""
    path = ROOT / "keras_adapter/backends/tensorflow.py"
    monkeypatch.setenv("RWKV6_TF_NATIVE", "x")
    with pytest.raises(ValueError, match="RWKV6_TF_NATIVE: expected 0 or 1, got 'x'"):
        runpy.run_path(str(path))
    monkeypatch.setenv("RWKV6_TF_NATIVE", "0")
    assert not runpy.run_path(str(path))["has_kernels"]
