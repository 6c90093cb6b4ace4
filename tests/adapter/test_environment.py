"""Environment variables and missing pieces, in a process of their own where it takes one."""

import contextlib
import importlib
import runpy
import shutil
import sys
import warnings
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
from backend import BACKEND, array, quick
from new_process import ROOT, run

import keras_adapter


@contextlib.contextmanager
def imported_anew(folder=ROOT):
    """The keras_adapter of a folder, as a program that starts now imports it."""
    before = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "keras_adapter"}

    def forget():
        for name in [n for n in sys.modules if n.split(".")[0] == "keras_adapter"]:
            del sys.modules[name]

    paths = mock.patch.object(sys, "path", [str(folder), *sys.path])
    registered = mock.patch.dict(keras.saving.get_custom_objects())  # Keras finds classes there
    with paths, registered:
        forget()
        try:
            yield importlib.import_module("keras_adapter")
        finally:
            forget()
            sys.modules.update(before)


def first_value(adapter):
    x = np.ones((1, 2, 1, 1), "float32")
    y, _ = quick(adapter.ops.wkv)(x, x, x, x, x[0, 0])
    return array(y).ravel()[0]


@pytest.mark.skipif(BACKEND != "jax", reason="one backend says enough")
def test_ops_kernel_forces_the_high_level_implementation(monkeypatch):
    monkeypatch.setenv("OPS_KERNEL", "1")
    with imported_anew() as adapter:
        assert not adapter.has_kernels
        assert first_value(adapter) == 1
        assert "keras_adapter.backends.jax" not in sys.modules


@pytest.mark.skipif(BACKEND != "numpy", reason="one backend says enough")
def test_ops_kernel_takes_0_or_1(monkeypatch):
    monkeypatch.setenv("OPS_KERNEL", "yes")
    with pytest.raises(ValueError, match="OPS_KERNEL: expected 0 or 1, got 'yes'"), imported_anew():
        pass


@pytest.mark.skipif(BACKEND != "numpy", reason="one backend says enough")
def test_pytorch_is_called_torch():
    done = run("import keras_adapter", KERAS_BACKEND="pytorch")
    assert done.returncode != 0
    assert "Keras calls its PyTorch backend 'torch', got 'pytorch'" in done.stderr


@pytest.mark.skipif(BACKEND not in ("jax", "tensorflow"), reason="has no XLA binding")
def test_without_the_binary_it_works_and_says_once_what_is_missing(tmp_path):
    ignore = shutil.ignore_patterns("*.so")
    shutil.copytree(ROOT / "keras_adapter", tmp_path / "keras_adapter", ignore=ignore)
    missing = "the compiled XLA binding could not be loaded"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with imported_anew(tmp_path) as adapter:
            assert Path(adapter.__file__).is_relative_to(tmp_path)
            assert not adapter.has_kernels
            assert first_value(adapter) == 1
    (message,) = [str(w.message) for w in warned if missing in str(w.message)]
    assert f"{tmp_path / 'keras_adapter/_xla.abi3.so'} does not exist" in message


@pytest.mark.skipif(BACKEND != "jax", reason="test_tensorflow_graphs.py has TensorFlow's")
def test_torch_is_not_imported_and_no_compiler_is_looked_for():
    code = (
        "import numpy as np, keras_adapter\n"
        "x = np.ones((1, 2, 1, 1), 'float32')\n"
        "print(keras_adapter.ops.wkv(x, x, x, x, x[0, 0])[0].ravel()[0])\n"
        "print(keras_adapter.has_kernels, {'torch', 'torch_rwkv6'} & sys.modules.keys())\n"
    )
    done = run(code, PATH="")
    assert done.stdout == f"1.0\n{keras_adapter.has_kernels} set()\n", done.stderr


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own variable")
def test_rwkv6_tf_native(monkeypatch):
    """1 is in test_tensorflow_graphs.py, and in a run of test_adapter.py."""
    path = ROOT / "keras_adapter/backends/tensorflow.py"
    monkeypatch.setenv("RWKV6_TF_NATIVE", "x")
    with pytest.raises(ValueError, match="RWKV6_TF_NATIVE: expected 0 or 1, got 'x'"):
        runpy.run_path(str(path))
    monkeypatch.setenv("RWKV6_TF_NATIVE", "0")
    assert not runpy.run_path(str(path))["has_kernels"]
