"""keras_adapter: the tests in tests/adapter, on each backend in a process of its own.

Keras has one backend a process. To run one of them by hand:
``KERAS_BACKEND=jax python -m pytest --confcutdir=tests/adapter tests/adapter``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "adapter"
RUNS: dict[str, dict[str, str]] = {
    "jax": {},
    "tensorflow": {},
    "torch": {},
    "numpy": {},
    "tensorflow, native everywhere": {"RWKV6_TF_NATIVE": "1"},
}
ONLY = {"tensorflow, native everywhere": ["test_operator.py", "test_peer_failures.py"]}


@pytest.mark.parametrize("name", RUNS)
def test_backend(name: str) -> None:
    backend = name.split(",")[0]
    for module in ("keras", backend):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install torch_rwkv6[keras]")
    files = [str(TESTS / file) for file in ONLY.get(name, ["."])]
    environment = {"KERAS_BACKEND": backend, "OPS_KERNEL": "0", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--confcutdir={TESTS}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        capture_output=True,
        text=True,
        cwd=TESTS.parent.parent,
        env=os.environ | environment | RUNS[name],
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    print(done.stdout.splitlines()[-1])
