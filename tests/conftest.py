import gc
import os
import signal
import sys
import threading
from pathlib import Path

# One thread a test process, which run side by side; also for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
# A shell's job in the background ignores Ctrl-C, and so would the processes that it starts.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

import torch_rwkv6

# The files that --device cuda runs: what the operator promises, on whatever device.
ON_EVERY_DEVICE = [
    f"test_{name}.py"
    for name in (
        "autocast", "backward", "compile", "forward", "fuzz", "gpu", "kept_states", "nonfinite",
        "opcheck", "transforms", "update",
    )
]  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where the operator's tests run; see `make test-gpu`",
    )


def pytest_configure(config):
    if config.getoption("device") == "cpu":
        return
    if not torch.cuda.is_available():
        pytest.exit("--device cuda: torch finds no NVIDIA GPU", returncode=1)
    if not torch_rwkv6.has_cuda_kernels:
        pytest.exit("--device cuda: torch_rwkv6 was built without CUDA kernels", returncode=1)
    torch.set_default_device("cuda")


def pytest_ignore_collect(collection_path, config):
    others = collection_path.suffix == ".py" and collection_path.name not in ON_EVERY_DEVICE
    return True if others and config.getoption("device") == "cuda" else None


def pytest_collection_modifyitems(config, items):
    """Leaves out what is about the other device, and says how much that is."""
    other = "gpu" if config.getoption("device") == "cpu" else "cpu"
    left_out = [item for item in items if item.get_closest_marker(other)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _no_second_look():
    """Libraries' and earlier tests' objects stay: collections need not walk through them again."""
    gc.freeze()


@pytest.fixture(scope="module")
def errors(request, tmp_path_factory):
    """Of the module's CASES, by number of processes and name: see run_cases of processes.py."""
    from processes import run_cases

    module = request.module
    return {
        size: run_cases(
            module.__name__, size, tmp_path_factory.mktemp(f"of_{size}"), module.SECONDS
        )
        for size in module.CASES
    }


@pytest.fixture
def two_threads():
    """Kernels cut their work even on a machine with one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


collect_ignore = ["adapter"]  # test_adapter.py runs these, each backend in a process of its own
