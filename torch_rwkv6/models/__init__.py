"""Checkpoints, tokenizers, text generation, and many sequences at once, for every version."""

from torch_rwkv6.models.checkpoint import load, read, save
from torch_rwkv6.models.engine import Engine, Request, Step
from torch_rwkv6.models.generation import GeneratedText, Generation, generate, generate_text
from torch_rwkv6.models.sampling import Penalties, Sampling
from torch_rwkv6.models.text import TextDecoder
from torch_rwkv6.models.tokenizers import load_tokenizer

__all__ = [
    "Engine",
    "GeneratedText",
    "Generation",
    "Penalties",
    "Request",
    "Sampling",
    "Step",
    "TextDecoder",
    "generate",
    "generate_text",
    "load",
    "load_tokenizer",
    "read",
    "save",
]
