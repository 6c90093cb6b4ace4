"""Finds and loads the compiled kernels; says once what is missing when it cannot."""

from __future__ import annotations

import ctypes
import warnings
from pathlib import Path

import torch

from torch_rwkv6._torch_private import has_kernel

_BINARY = Path(__file__).with_name("_C.abi3.so")


def _load() -> bool:
    """Loads the torch binding and through it the kernel library. True when they are there."""
    try:
        if not _BINARY.exists():
            raise OSError(f"{_BINARY} does not exist")
        torch.ops.load_library(str(_BINARY))
    except OSError as error:
        warnings.warn(
            "torch_rwkv6: the compiled kernels could not be loaded, so every operator runs its "
            "pure PyTorch reference: the same results, but hundreds of times slower.\n"
            f"Reason: {error}\n"
            "To build them (g++ is all it takes, nvcc beside it for GPUs): pip install "
            "--force-reinstall --no-deps --no-binary torch_rwkv6 torch_rwkv6, or `pip install .` "
            "in a checkout.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def cuda_problem() -> str | None:
    """Why the loaded kernel library cannot run CUDA kernels here; None where nothing is known."""
    problem = ctypes.CDLL(str(_BINARY.with_name("librwkv6.so"))).rwkv6_cuda_problem
    problem.restype = ctypes.c_char_p
    text = problem()
    return None if text is None else text.decode()


has_kernels: bool = _load()
# They were built, and torch can use them.
has_cuda_kernels: bool = has_kernels and has_kernel("rwkv6::wkv", "CUDA")
