"""Tokenizers from libraries: bytes, the World vocabulary and the 20B tokenizer's JSON file."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["ByteTokenizer", "JsonTokenizer", "Tokenizer", "WorldTokenizer", "load_tokenizer"]

# What the end of a text is called in tokenizers' JSON files, which do not say which token it is
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "</s>")


class TextStream(Protocol):
    """Turns tokens into text one at a time, and holds back incomplete characters."""

    def push(self, token: int) -> str:
        """The text that is complete now; "" while a character is incomplete."""

    def flush(self) -> str:
        """What remains at the end: U+FFFD for an incomplete character."""


class Tokenizer(Protocol):
    """The interface that generation needs from a tokenizer.

    Attributes:
        vocab_size: no token is as large.
        end_tokens: the tokens that end a text, and have none of their own.
    """

    vocab_size: int
    end_tokens: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """The tokens of a text.

        Raises:
            UnicodeEncodeError: a character that it does not have, or half of one.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; bytes that are no UTF-8 become U+FFFD."""

    def stream(self) -> TextStream:
        """A new stream."""


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name.

    Args:
        name: ``"bytes"`` (of UTF-8), ``"bytes:ENCODING"`` of another encoding that Python knows,
            such as utf-16-le; ``"world"``, the vocabulary of the World models; or the path of a
            tokenizer's JSON file, such as ``20B_tokenizer.json``.

    Raises:
        ImportError: the library is missing; the message says how to install it.
        OSError, ValueError: there is no such tokenizer, or its file cannot be read.
        TypeError: no name.
    """
    if not isinstance(name, str):
        raise TypeError(f"tokenizer: expected a name, got {type(name).__name__}")
    kind, _, encoding = name.partition(":")
    if kind == "bytes":
        return ByteTokenizer(encoding or "utf-8")
    if name == "world":
        return WorldTokenizer()
    if not name.endswith(".json"):
        raise ValueError(f"tokenizer: expected bytes, world or a .json file, got {name}")
    return JsonTokenizer(name)


class _ByteStream:
    """From tokens that stand for bytes, through an incremental decoder."""

    def __init__(self, bytes_of: Any, encoding: str) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """One token per byte of the encoded text; none ends a text.

    Raises:
        ValueError: Python knows no such encoding of text.
    """

    end_tokens: frozenset[int] = frozenset()

    def __init__(self, encoding: str = "utf-8") -> None:
        # There are some that turn text into text (rot13), that cannot be read in pieces (idna), and
        # that begin every text with a mark (utf-16, where utf-16-le does not).
        try:
            decoder = codecs.getincrementaldecoder(encoding)("strict")
            pieces = "a".encode(encoding) + "b".encode(encoding)
            good = "".join(decoder.decode(bytes([byte])) for byte in pieces) == "ab"
            good = good and pieces == "ab".encode(encoding)
        except (LookupError, TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(
                f"tokenizer: expected an encoding of text that goes on where it ended, such as "
                f"utf-8 or utf-16-le, got {encoding}"
            )
        self.encoding, self.vocab_size = encoding, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode(self.encoding))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(self.encoding, errors="replace")

    def stream(self) -> TextStream:
        return _ByteStream(lambda token: bytes([token]), self.encoding)


class WorldTokenizer:
    """The World vocabulary of RWKV-4 World, RWKV-5 and RWKV-6: 65,529 tokens, through ``rwkv``.

    Token 0, which the vocabulary itself does not have, ends a text.

    Args:
        file: of the vocabulary; None is that of the package.

    Raises:
        ImportError: the package rwkv is missing.
        OSError: there is no such file.
    """

    vocab_size = 65530
    end_tokens = frozenset({0})

    def __init__(self, file: str | None = None) -> None:
        own = _world_file()
        self.file = own if file is None else Path(file)
        self._is_own = self.file == own or self.file.read_bytes() == own.read_bytes()
        self._trie = _world_trie(own if self._is_own else self.file)

    def __reduce__(self) -> tuple[Any, ...]:  # the trie is too deep to be pickled
        return WorldTokenizer, (str(self.file),)

    def encode(self, text: str) -> list[int]:
        return list(self._trie.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Many texts; through the package pyrwkv-tokenizer where it is installed, much faster."""
        fast = _fast_world() if self._is_own else None
        return [list(fast.encode(text)) if fast else self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        return _ByteStream(self.bytes_of, "utf-8")

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for; nothing where the vocabulary does not have it."""
        found: bytes = self._trie.idx2token.get(token, b"")
        return found


def _world_file() -> Path:
    try:
        from rwkv import rwkv_tokenizer
    except ImportError as error:
        raise ImportError(
            "the World vocabulary needs the package rwkv: pip install torch_rwkv6[text]"
        ) from error
    return Path(rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")


@functools.cache  # building it takes a second
def _world_trie(file: Path) -> Any:
    from rwkv import rwkv_tokenizer

    return rwkv_tokenizer.TRIE_TOKENIZER(str(file))


@functools.cache
def _fast_world() -> Any:
    """The tokenizer of the package pyrwkv-tokenizer; None where it is not installed."""
    try:
        import pyrwkv_tokenizer
    except ImportError:
        return None
    return pyrwkv_tokenizer.RWKVTokenizer()


class JsonTokenizer:
    """A tokenizer of Hugging Face's ``tokenizers``, such as RWKV-4's 20B_tokenizer.json.

    A text ends at the ``eos_token`` of the tokenizer_config.json in its folder; where there is
    none, at the special tokens that have one of the usual names, such as ``<|endoftext|>``.

    Raises:
        ImportError: the package tokenizers is missing.
        OSError, ValueError: the file cannot be read, or holds no tokenizer.
    """

    def __init__(self, path: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "a tokenizer's JSON file needs the package tokenizers: pip install "
                "torch_rwkv6[text]"
            ) from error
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} holds no tokenizer: {error}") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.end_tokens = self._end_tokens(Path(path).with_name("tokenizer_config.json"))

    def _end_tokens(self, config: Path) -> frozenset[int]:
        names: tuple[str, ...] = END_TOKENS
        special = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        try:
            told = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError):
            told = None
        told = told.get("content") if isinstance(told, dict) else told
        if told is not None:
            names = (told,)
        return frozenset(special[name] for name in names if name in special)

    def encode(self, text: str) -> list[int]:
        text.encode()  # raises for half a character, of which the library says that it is no text
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    def stream(self) -> TextStream:
        return _JsonStream(self._tokenizer)


class _JsonStream:
    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._decoder = tokenizer, DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        piece: str | None = self._decoder.step(self._tokenizer, token)
        self._pending = [*self._pending, token] if piece is None else []
        return piece or ""

    def flush(self) -> str:
        return str(self._tokenizer.decode(self._pending)) if self._pending else ""
