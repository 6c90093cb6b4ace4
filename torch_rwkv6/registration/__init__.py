"""What PyTorch must know of the operators, one promise a file.

The binary brings the schemas and the kernels (csrc/bindings/torch.cpp); importing this package
adds the rest, in this order and before anybody's first call.
"""

from torch_rwkv6.registration import (  # noqa: F401
    autocast,
    autograd,
    fake,
    fallback,
    schema,  # isort: skip  (defines the operators when the binary is missing)
    vmap,
)
