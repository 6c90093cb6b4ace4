"""Finds and loads the XLA binding of the kernels, for JAX and TensorFlow; imports no framework.

The binding finds the kernel library by its place beside it: torch_rwkv6, which would import torch,
is not imported.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

FORWARD, BACKWARD = "rwkv6_xla_forward", "rwkv6_xla_backward"  # also the custom calls' names
_BINARY = Path(__file__).with_name("_xla.abi3.so")


def built_with_cuda(binding: ctypes.CDLL) -> bool:
    """Whether the kernel library behind the binding was built with CUDA, GPU or not."""
    architectures = binding.rwkv6_cuda_architectures
    architectures.restype = ctypes.c_char_p
    return architectures() is not None


@functools.cache
def load() -> ctypes.CDLL | None:
    """The binding, or None, after a warning, where it is not there."""
    try:
        if not _BINARY.exists():
            raise OSError(f"{_BINARY} does not exist")
        return ctypes.CDLL(str(_BINARY))
    except OSError as error:
        warnings.warn(
            "keras_adapter: the compiled XLA binding could not be loaded, so WKV is computed with "
            "keras.ops: the same results, but several times slower.\n"
            f"Reason: {error}\n"
            "To build it (g++ and jaxlib are all it takes): RWKV6_XLA=1 pip install "
            "--force-reinstall --no-deps --no-build-isolation . in a checkout.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
