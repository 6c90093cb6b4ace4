"""Sequences cut over processes (context parallel), on torch.distributed alone.

Sharding over heads and sequences needs nothing of this: the operators take DTensors.
"""

from torch_rwkv6.parallel.token_shift import token_shift
from torch_rwkv6.parallel.wkv import wkv

__all__ = ["token_shift", "wkv"]
