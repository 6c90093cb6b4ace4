"""Official checkpoints in, text out: loading, tokenizers and generation for every version."""

from torch_rwkv6.models.checkpoint import load, save

__all__ = ["load", "save"]
