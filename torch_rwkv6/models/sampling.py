"""From logits to the next token: penalties, top-p, top-k and temperature, row by row."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Penalties", "Sampling", "probabilities"]

NUCLEUS = 512  # a top-p nucleus is looked for among so many tokens before all are sorted


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token; below 1 sharpens, above 1 flattens.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1].

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.85

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (all) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")


def probabilities(
    logits: Tensor,  # [B, V]
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:  # [B, K], [B, K]
    """The tokens that may come next, likeliest first, and the probabilities they are drawn with.

    The order of ChatRWKV: top_p and top_k cut the softmax of the logits as they are; what is left
    is raised to the power 1 / temperature. A token exactly as likely as the last one kept stays.

    Args:
        logits: [B, V], of any floating-point dtype.
        sampling: the settings; temperature 0 leaves one token.

    Returns:
        probabilities, [B, K] float32, zero where a row keeps fewer, and token ids, [B, K] int64.

    Raises:
        FloatingPointError: logits hold NaN.
    """
    highest, best = logits.float().max(1, keepdim=True)
    if bool(highest.isnan().any()):
        raise FloatingPointError("logits: NaN, from which no token can be drawn")
    if sampling.temperature == 0:
        return torch.ones_like(highest), best
    p = torch.softmax(logits.float(), 1)
    vocab = p.shape[1]
    k = min(sampling.top_k or vocab, vocab)
    found, token = p.topk(min(k, NUCLEUS), 1)
    if found.shape[1] < k and bool((found.sum(1) < sampling.top_p).any()):
        found, token = p.topk(k, 1)
    before = found.cumsum(1) - found  # what the likelier tokens reach
    reached = (before >= sampling.top_p).cumsum(1) > 0
    last = found.masked_fill(reached, torch.inf).amin(1, keepdim=True)
    kept = found.masked_fill(found < last, 0.0)
    kept = (kept / kept[:, :1]) ** (1 / sampling.temperature)
    return kept / kept.sum(1, keepdim=True), token


def draw(
    p: Tensor,  # [B, K]
    token: Tensor,  # [B, K]
    generators: list[torch.Generator],  # one a row
) -> Tensor:  # [B]
    """One token a row, by the row's own stream of random numbers."""
    if p.shape[1] == 1:
        return token[:, 0]
    u = torch.stack([torch.rand(1, generator=g) for g in generators]).to(p.device)  # [B, 1]
    total = p.cumsum(1)
    index = (total <= u * total[:, -1:]).sum(1, keepdim=True)
    return token.gather(1, index.clamp(max=p.shape[1] - 1))[:, 0]


class Penalties:
    """Repetition penalties as in ChatRWKV: for every token of a row how often it was written.

    A token that was written n times, n > 0, loses ``presence + n * frequency`` from its logit; n
    fades by ``decay`` with every token written. (``PIPELINE.generate`` of the package rwkv.)

    Args:
        presence, frequency, decay: the three settings; presence = frequency = 0 is no penalty.
        free: tokens whose n stays 0: they lose ``presence`` alone. ChatRWKV frees white space and
            digits.

    Raises:
        ValueError: decay outside 0 to 1.
    """

    def __init__(
        self, presence: float, frequency: float, decay: float, free: Collection[int] = ()
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"alpha_decay: expected 0 to 1, got {decay}")
        self.presence, self.frequency, self.decay = presence, frequency, decay
        self.free = torch.tensor(sorted(free), dtype=torch.int64)
        self.count: Tensor | None = None  # [B, V]
        self.seen: Tensor | None = None  # [B, V]

    @property
    def active(self) -> bool:
        return self.presence != 0 or self.frequency != 0

    def apply(self, logits: Tensor) -> Tensor:  # [B, V]
        """The logits less the penalties."""
        if not self.active or self.count is None or self.seen is None:
            return logits
        return logits.float() - (self.seen * self.presence + self.count * self.frequency)

    def add(self, tokens: Tensor, logits: Tensor) -> None:  # [B], [B, V]
        """Counts the tokens just written."""
        if not self.active:
            return
        if self.count is None or self.seen is None:
            self.count = torch.zeros_like(logits, dtype=torch.float32)
            self.seen = torch.zeros_like(self.count)
        one = torch.ones_like(tokens, dtype=torch.float32)
        one[torch.isin(tokens, self.free.to(tokens.device))] = 0.0
        self.count *= self.decay
        self.count.scatter_add_(1, tokens[:, None], one[:, None])
        self.seen.scatter_(1, tokens[:, None], 1.0)
