"""Tests of keras_adapter on one backend, that of KERAS_BACKEND: tests/test_adapter.py runs them.

Files named after a backend belong to it alone.
"""

import gc
import os
import sys

import pytest
from new_process import unneeded

BACKEND = os.environ["KERAS_BACKEND"]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Programs that run once: what takes time is compiling, above all what XLA has MLIR fuse, and the
# cutting of each program into parts that are compiled side by side.
flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
flags += " --xla_cpu_parallel_codegen_split_count=1"
if BACKEND == "jax":  # eight devices on the CPU, for the tests of sharding
    flags += " --xla_force_host_platform_device_count=8"
os.environ.setdefault("XLA_FLAGS", flags)
sys.modules |= dict.fromkeys(unneeded(BACKEND))

_OWN = {"jax": "test_jax_*.py", "tensorflow": "test_tensorflow_*.py", "torch": "test_torch_*.py"}
collect_ignore_glob = [pattern for name, pattern in _OWN.items() if name != BACKEND]


@pytest.fixture(autouse=True, scope="module")
def _no_second_look():
    """Frameworks' and earlier tests' objects stay: a full collection, which Keras asks for whenever
    it quantizes a map, need not walk through them again."""
    gc.freeze()
