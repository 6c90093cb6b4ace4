"""RWKV-6 for PyTorch: the WKV6 operator with native kernels, layers and models."""

from torch_rwkv6 import models, nn, parallel, reference
from torch_rwkv6._library import has_cuda_kernels, has_kernels
from torch_rwkv6.models import generate
from torch_rwkv6.ops import wkv, wkv4, wkv4_update, wkv_update
from torch_rwkv6.version import __version__

__all__ = [
    "__version__",
    "generate",
    "has_cuda_kernels",
    "has_kernels",
    "models",
    "nn",
    "parallel",
    "reference",
    "wkv",
    "wkv4",
    "wkv4_update",
    "wkv_update",
]
