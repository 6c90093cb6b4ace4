"""Loading and saving checkpoints, tokenizers, and text generation, for every version."""

from torch_rwkv6.models.checkpoint import load, save
from torch_rwkv6.models.generation import generate, generate_text
from torch_rwkv6.models.tokenizers import load_tokenizer

__all__ = ["generate", "generate_text", "load", "load_tokenizer", "save"]
