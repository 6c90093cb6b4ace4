import os
import sys
from pathlib import Path

# One thread a test process, which run side by side; also for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    """Kernels cut their work even on a machine with one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


collect_ignore = ["adapter"]  # test_adapter.py runs these, each backend in a process of its own
