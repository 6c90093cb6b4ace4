"""The registration of the operators with PyTorch, one file for each feature.

The binary registers the schemas and the kernels (csrc/bindings/torch.cpp); importing this package
registers the rest, before the first call. All of it follows from `torch_rwkv6.contract`.
"""

from torch_rwkv6.registration import (  # noqa: F401
    autocast,
    autograd,
    fake,
    fallback,
    flops,
    schema,
    sharding,
    vmap,
)
