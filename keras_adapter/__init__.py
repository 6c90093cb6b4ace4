"""RWKV-6 for Keras 3: one operator with one behaviour on torch, JAX, TensorFlow and NumPy.

``KERAS_BACKEND`` chooses the backend, as everywhere in Keras. ``OPS_KERNEL=1``, set before the
import, forces the high-level implementation in place of the native kernels.
"""

try:
    import keras  # noqa: F401
except ValueError as error:
    if "pytorch" not in str(error):
        raise
    raise ValueError(
        "KERAS_BACKEND: Keras calls its PyTorch backend 'torch', got 'pytorch'"
    ) from error

from keras_adapter import layers, ops
from keras_adapter.backends import has_kernels
from keras_adapter.layers import RWKV6ChannelMix, RWKV6TimeMix
from keras_adapter.operator import RWKVKernelOperator, get_rwkv6_kernel

__all__ = [
    "RWKV6ChannelMix",
    "RWKV6TimeMix",
    "RWKVKernelOperator",
    "get_rwkv6_kernel",
    "has_kernels",
    "layers",
    "ops",
]
