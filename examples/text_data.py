"""Text as tokens: how it is fed to a model, and what simple models make of its bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


def tensor_of(text: bytes | Sequence[int]) -> Tensor:
    """The tokens of a text, [T]: its bytes as they are, uint8, or ids, int32."""
    if isinstance(text, bytes):
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return torch.tensor(text, dtype=torch.int32)


def count(text: bytes | Sequence[int]) -> str:
    """How long a text is, for a message."""
    return f"{len(text)} {'bytes' if isinstance(text, bytes) else 'tokens'}"


class Lanes(IterableDataset[tuple[Tensor, Tensor]]):
    """Text cut into lanes that are read side by side: batch i goes on where batch i - 1 ended.

    So the state after a batch is the state before the next, and a model learns from a context far
    longer than a batch. Yields the tokens and the next tokens, int64 [lanes, up to length] each.

    Raises:
        ValueError: the text has not two tokens for every lane.
    """

    def __init__(
        self,
        text: bytes | Sequence[int],
        lanes: int,
        length: int,
        first: int = 0,
        endless: bool = False,
    ):
        if len(text) < 2 * lanes:
            raise ValueError(f"the text has {count(text)}: too few for {lanes} lanes")
        self.data = tensor_of(text)[: len(text) // lanes * lanes].view(lanes, -1)  # [lanes, T]
        self.length, self.first, self.endless = length, first, endless

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pieces = (self.data.shape[1] - 2) // self.length + 1
        steps = itertools.count(self.first) if self.endless else range(pieces)
        for step in steps:
            start = step % pieces * self.length
            piece = self.data[:, start : start + self.length + 1].long()
            yield piece[:, :-1], piece[:, 1:]


class TextData(lightning.LightningDataModule):
    """Training on the first part of a text, validation on the last, which training never sees."""

    def __init__(self, text: bytes, batch_size: int, length: int, val_fraction: float = 0.02):
        super().__init__()
        self.batch_size, self.length = batch_size, length
        cut = len(text) - int(len(text) * val_fraction)
        self.train_text, self.val_text = text[:cut], text[cut:]
        self.val_lanes = max(1, min(16, len(self.val_text) // 256))
        if len(self.train_text) < 2 * batch_size or len(self.val_text) < 2:
            raise ValueError(
                f"the text has {count(text)}: too few for {batch_size} lanes of training and "
                f"{val_fraction:.0%} of validation"
            )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        # a resumed run goes on where the text was left
        first = self.trainer.global_step if self.trainer is not None else 0
        lanes = Lanes(self.train_text, self.batch_size, self.length, first, endless=True)
        return DataLoader(lanes, batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(Lanes(self.val_text, self.val_lanes, 512), batch_size=None)


def bytes_per_character(text: bytes) -> float:
    """1 for ASCII; turns bits per byte into bits per character."""
    return len(text) / max(1, len(text.decode("utf-8", errors="replace")))


def unigram_bits(train: bytes, val: bytes) -> float:
    """Bits per character of val under the byte frequencies of train (plus one each)."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1
    bits = -np.log2(counts / counts.sum())
    return float(bits[np.frombuffer(val, np.uint8)].mean()) * bytes_per_character(val)


def bigram_bits(train: bytes, val: bytes) -> float:
    """As `unigram_bits`, with the byte before known."""
    pairs = [np.frombuffer(x, np.uint8).astype(np.int64) for x in (train, val)]
    pairs = [256 * x[:-1] + x[1:] for x in pairs]
    counts = np.bincount(pairs[0], minlength=65536).reshape(256, 256) + 1
    bits = -np.log2(counts / counts.sum(1, keepdims=True)).reshape(-1)
    return float(bits[pairs[1]].mean()) * bytes_per_character(val)
