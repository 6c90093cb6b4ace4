"""The World vocabulary as a tokenizer of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from torch_rwkv6.models.tokenizers import WorldTokenizer

__all__ = ["RWKV6Tokenizer"]

_END = "<|endoftext|>"  # token 0, which the vocabulary's file does not have


class RWKV6Tokenizer(PreTrainedTokenizer):
    """The World vocabulary of RWKV-6: 65,529 byte strings, of which the longest is taken.

    A token is written as text with one character for each of its bytes (Latin-1), because many are
    no whole characters of UTF-8. Texts come back as they were, whatever is in them. Token 0 begins
    and ends texts and pads batches; it is not added to a text. A fast tokenizer, of the library
    ``tokenizers``, would be slower: docs/transformers.md has the measurement.

    Args:
        vocab_file: a vocabulary of the package ``rwkv``'s form; None is its own.
        kwargs: of transformers' ``PreTrainedTokenizer``.

    Raises:
        ImportError: the package rwkv is missing.
        OSError: there is no such file.
    """

    vocab_files_names = {"vocab_file": "rwkv_vocab_v20230424.txt"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | None = None,
        *,
        bos_token: Any = _END,
        eos_token: Any = _END,
        pad_token: Any = _END,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> None:
        self.world = WorldTokenizer(vocab_file)
        tokens = range(1, self.world.vocab_size)
        self._ids = {_END: 0, **{self.world.bytes_of(i).decode("latin-1"): i for i in tokens}}
        self._tokens = {i: token for token, i in self._ids.items()}
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            padding_side=padding_side,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, without those that ``add_tokens`` has added."""
        return self.world.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._tokens[i] for i in self.world.encode_batch([text])[0]]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens.get(index, "")  # models have rows for more than there are

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of some tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self._bytes, tokens)).decode("utf-8", errors="replace")

    def _bytes(self, token: str) -> bytes:
        found = self._ids.get(token, 0)
        return self.world.bytes_of(found) if found else token.encode()  # 0: an added one

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        if target.resolve() != self.world.file.resolve():
            shutil.copyfile(self.world.file, target)
        return (str(target),)
