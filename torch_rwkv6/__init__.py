"""RWKV-6 for PyTorch: the WKV6 operator with native kernels, layers and models."""

from torch_rwkv6 import _library

has_kernels: bool = _library.load()  # before registration, which builds on what it finds
has_cuda_kernels: bool = has_kernels and _library.has_cuda_kernels()

from torch_rwkv6 import reference, registration  # noqa: E402, F401, I001
from torch_rwkv6.ops import wkv, wkv4, wkv4_update, wkv_update  # noqa: E402
from torch_rwkv6 import models, nn  # noqa: E402
from torch_rwkv6.models import generate  # noqa: E402
from torch_rwkv6.version import __version__  # noqa: E402

__all__ = [
    "__version__",
    "generate",
    "has_cuda_kernels",
    "has_kernels",
    "models",
    "nn",
    "reference",
    "wkv",
    "wkv4",
    "wkv4_update",
    "wkv_update",
]
