"""Text as tokens: how it is fed to a model, and what simple models make of its bytes."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


def tensor_of(text: bytes) -> Tensor:
    """The bytes of a text, [T] uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Lanes(IterableDataset[tuple[Tensor, Tensor]]):
    """Text cut into lanes that are read side by side: batch i goes on where batch i - 1 ended.

    So the state after a batch is the state before the next, and a model learns from a context far
    longer than a batch. Yields the tokens and the next tokens, int64 [lanes, up to length] each; of
    num_replicas processes that share the lanes, rank has its own, [lanes / num_replicas, ...].

    Raises:
        ValueError: the text has not two tokens for every lane.
    """

    def __init__(
        self,
        text: bytes,
        lanes: int,
        length: int,
        first: int = 0,
        endless: bool = False,
        rank: int = 0,
        num_replicas: int = 1,
    ):
        if len(text) < 2 * lanes:
            raise ValueError(f"the text has {len(text)} bytes: too few for {lanes} lanes")
        data = tensor_of(text)[: len(text) // lanes * lanes].view(lanes, -1)  # [lanes, T]
        self.data = data.chunk(num_replicas)[rank]
        self.length, self.first, self.endless = length, first, endless

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pieces = (self.data.shape[1] - 2) // self.length + 1
        steps = itertools.count(self.first) if self.endless else range(pieces)
        for step in steps:
            start = step % pieces * self.length
            piece = self.data[:, start : start + self.length + 1].long()
            yield piece[:, :-1], piece[:, 1:]


class Crops(IterableDataset[tuple[Tensor, Tensor]]):
    """Pieces from anywhere in a text, each to be read from the initial state.

    Yields the tokens and the next tokens, int64 [size, length] each, without end.

    Raises:
        ValueError: the text is shorter than a piece.
    """

    def __init__(self, text: bytes, size: int, length: int, seed: int = 0):
        if len(text) <= length:
            raise ValueError(f"the text has {len(text)} bytes: too few for pieces of {length}")
        self.data = tensor_of(text)
        self.size, self.length, self.seed = size, length, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        positions = torch.arange(self.length + 1)
        while True:
            first = torch.randint(len(self.data) - self.length, (self.size, 1), generator=generator)
            pieces = self.data[first + positions].long()  # [size, length + 1]
            yield pieces[:, :-1], pieces[:, 1:]


def share_of(data: lightning.LightningDataModule) -> dict[str, int]:
    """What this process reads of the data: its rank among num_replicas processes.

    The processes of one tensor-parallel group are one replica: they read the same.
    """
    share = None if data.trainer is None else data.trainer.distributed_sampler_kwargs
    return share or {"rank": 0, "num_replicas": 1}


class TextData(lightning.LightningDataModule):
    """Training on the first part of a text, validation on the last, which training never sees."""

    def __init__(self, text: bytes, batch_size: int, length: int, val_fraction: float = 0.02):
        super().__init__()
        self.batch_size, self.length = batch_size, length
        self.checksum = zlib.crc32(text)
        cut = len(text) - int(len(text) * val_fraction)
        self.train_text, self.val_text = text[:cut], text[cut:]
        self.val_lanes = max(1, min(16, len(self.val_text) // 256))
        if len(self.train_text) < 2 * batch_size or len(self.val_text) < 2:
            raise ValueError(
                f"the text has {len(text)} bytes: too few for {batch_size} lanes of training and "
                f"{val_fraction:.0%} of validation"
            )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        # a resumed run goes on where the text was left
        first = self.trainer.global_step if self.trainer is not None else 0
        share = share_of(self)
        lanes = Lanes(self.train_text, self.batch_size, self.length, first, True, **share)
        return DataLoader(lanes, batch_size=None)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The same for all processes: there is little of it."""
        return DataLoader(Lanes(self.val_text, self.val_lanes, 512), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        return {"checksum": self.checksum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["checksum"] != self.checksum:
            raise ValueError("--data: expected the text of the run, got another one")


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
