"""What PyTorch must know of the operators, one promise a file.

The binary brings the schemas and the kernels (csrc/bindings/torch.cpp); importing this package
adds the rest before anybody's first call.
"""

from torch_rwkv6.registration import autocast, autograd, fake, fallback, schema, vmap  # noqa: F401
