"""Models and sequences over many processes, on torch.distributed alone.

The operators need nothing of this where they are sharded over heads or sequences: they take
DTensors.
"""

from torch_rwkv6.parallel.parallelize import parallelize
from torch_rwkv6.parallel.token_shift import token_shift
from torch_rwkv6.parallel.wkv import wkv

__all__ = ["parallelize", "token_shift", "wkv"]
