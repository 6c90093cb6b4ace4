"""The operators' schemas, where the binary has not brought them (csrc/bindings/torch.cpp)."""

from __future__ import annotations

import torch

from torch_rwkv6._library import has_kernels
from torch_rwkv6.contract import SCHEMAS

library = torch.library.Library("rwkv6", "FRAGMENT")
if not has_kernels:
    for name, signature in SCHEMAS.items():
        library.define(name + signature)
