"""Programs that must start anew, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(importlib.util.find_spec("keras_adapter").origin).parent.parent


def unneeded(backend):
    """What Keras would import too, to find out whose arrays it was given: seconds of a process."""
    others = {"jax", "pandas", "tensorflow"} - {backend}
    return others - {"jax"} if backend == "numpy" else others  # numpy borrows from JAX


def run(code, cwd=ROOT, **environment):
    """stdout, stderr and exit status of a Python program that finds keras_adapter."""
    without = unneeded(os.environ["KERAS_BACKEND"])
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules |= dict.fromkeys({without})\n{code}"],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )
