"""Multi-query associative recall: a test of memory for things seen once.

Arora et al., "Zoology", arXiv:2312.04927. A text begins with pairs of a key and a value, drawn
anew for each text, and later asks for the keys again, among blanks:

    a 4  b 9  c 1  ....  b  ......  a  ...  c  .      answers: 9, 4, 1

Nothing can be learnt by heart. A model has to bind values to keys, keep them all over any distance
and find the right one by its key.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # the target that cross_entropy ignores


def batch(
    size: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``size`` texts, [B, T], and the answers where one is due, IGNORE elsewhere, [B, T].

    Token 0 is a blank, keys are below vocab_size // 2, values from there on.
    """
    half = vocab_size // 2
    if not 1 <= pairs < half or 3 * pairs > length:
        raise ValueError(
            f"recall: {pairs} pairs need a length of {3 * pairs} and a vocabulary of "
            f"{2 * pairs + 2}, got {length} and {vocab_size}"
        )
    keys = 1 + choices(size, half - 1, pairs, generator)  # [B, P], all different
    values = torch.randint(half, vocab_size, (size, pairs), generator=generator)
    tokens = torch.zeros(size, length, dtype=torch.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    asked = 2 * pairs + choices(size, length - 2 * pairs, pairs, generator)  # positions
    answers = torch.full_like(tokens, IGNORE)
    return tokens.scatter(1, asked, keys), answers.scatter(1, asked, values)


def choices(rows: int, n: int, k: int, generator: torch.Generator) -> Tensor:
    """In every row k different numbers below n, in random order, [rows, k]."""
    return torch.rand(rows, n, generator=generator).argsort(1)[:, :k]


def accuracy(logits: Tensor, answers: Tensor) -> float:
    """The share of answers that the likeliest token gets right; [B, T, V], [B, T]."""
    due = answers != IGNORE
    return (logits.argmax(2) == answers)[due].float().mean().item()
