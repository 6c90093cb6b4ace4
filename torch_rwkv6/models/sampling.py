"""From logits to the next token: penalties, top-p, top-k and temperature, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_rwkv6.arguments import integer, number

__all__ = ["Penalties", "Sampling", "draw", "probabilities"]

NUCLEUS = 512  # the number of tokens among which a top-p nucleus is searched before all are sorted


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token; below 1 sharpens, above 1 flattens.
        top_k: only the k likeliest tokens; 0 is all. Of equally likely ones any may be the last.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1], and all
            that are exactly as likely as the last of them; 1 is all.

    Raises:
        TypeError: no number, or no integer as top_k.
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.85

    def __post_init__(self) -> None:
        if number("temperature", self.temperature) < 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        object.__setattr__(self, "top_k", integer("top_k", self.top_k, 0))  # NumPy's, too
        if not 0 < number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")


def probabilities(
    logits: Tensor,  # [B, V]
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:  # [B, K], [B, K]
    """The tokens that may come next, likeliest first, and the probabilities they are drawn with.

    The order of ChatRWKV: top_p and top_k cut the softmax of the logits as they are; what is left
    is raised to the power 1 / temperature.

    Args:
        logits: [B, V], of any floating-point dtype. A token whose logit is -inf is never drawn.
        sampling: the settings; temperature 0 leaves one token.

    Returns:
        probabilities, [B, K] float32, zero where a row keeps fewer, and token ids, [B, K] int64,
        of which equally likely ones stand in ascending order.

    Raises:
        FloatingPointError: logits hold NaN or inf, or nothing but -inf.
    """
    logits = logits.float()
    highest, best = logits.max(1, keepdim=True)  # NaN where a row holds one
    if not bool(highest.isfinite().all()):
        found = highest[~highest.isfinite()][0].item()
        raise FloatingPointError(
            f"logits: expected finite numbers, got {'NaN' if found != found else found}, from "
            "which no token can be drawn (where float16 overflows, bfloat16 does not)"
        )
    if sampling.temperature == 0:
        return torch.ones_like(highest), best
    p = torch.softmax(logits, 1)
    vocab = p.shape[1]
    k = min(sampling.top_k or vocab, vocab)
    likeliest, token = p.topk(min(k, NUCLEUS), 1)
    last = _last_kept(likeliest, sampling.top_p)
    if likeliest.shape[1] < k and bool((likeliest[:, -1:] >= last).any()):  # there may be more
        likeliest, token = p.topk(k, 1)
        last = _last_kept(likeliest, sampling.top_p)
    # topk leaves the order of equally likely tokens open, and the draw depends on the order
    token, order = token.sort(1)
    likeliest, order = likeliest.gather(1, order).sort(dim=1, descending=True, stable=True)
    token = token.gather(1, order)
    kept = (likeliest / likeliest[:, :1]) ** (1 / sampling.temperature)
    kept = kept.masked_fill((likeliest < last) | (likeliest == 0), 0.0)
    return kept / kept.sum(1, keepdim=True), token


def _last_kept(
    likeliest: Tensor,  # [B, K], descending
    top_p: float,
) -> Tensor:  # [B, 1]
    """The probability of the last token that top_p keeps."""
    if top_p == 1:
        return likeliest[:, -1:]
    before = likeliest.double().cumsum(1) - likeliest  # what the likelier tokens reach
    return likeliest.masked_fill(before >= top_p, torch.inf).amin(1, keepdim=True)


def draw(
    p: Tensor,  # [B, K]
    token: Tensor,  # [B, K]
    generators: Sequence[torch.Generator],  # one a row, on the CPU
) -> Tensor:  # [B]
    """One token per row, drawn with the row's own random number generator."""
    if p.shape[1] == 1:
        return token[:, 0]
    # not of the default dtype and device, which are the user's
    u = torch.stack(
        [torch.rand(1, generator=g, dtype=torch.float32, device="cpu") for g in generators]
    ).to(p.device)  # [B, 1]
    total = p.cumsum(1)
    index = (total <= u * total[:, -1:]).sum(1, keepdim=True)
    return token.gather(1, index.clamp(max=p.shape[1] - 1))[:, 0]


class Penalties:
    """Repetition penalties as in ChatRWKV: counts how often each row has produced each token.

    A token that was produced n times, n > 0, loses ``presence + n * frequency`` from its logit; n
    is multiplied by ``decay`` with every token produced. (``PIPELINE.generate`` of the package
    rwkv.)

    Args:
        presence, frequency, decay: the three settings; presence = frequency = 0 is no penalty.
        free: tokens whose n stays 0: they lose ``presence`` alone. ChatRWKV frees white space and
            digits.

    Raises:
        TypeError: no number.
        ValueError: one that is not finite, or decay outside 0 to 1.
    """

    def __init__(
        self, presence: float, frequency: float, decay: float, free: Iterable[int] = ()
    ) -> None:
        if not 0 <= number("alpha_decay", decay) <= 1:
            raise ValueError(f"alpha_decay: expected 0 to 1, got {decay}")
        self.presence = number("alpha_presence", presence)
        self.frequency = number("alpha_frequency", frequency)
        self.decay = decay
        self.free = torch.tensor(sorted(free), dtype=torch.int64, device="cpu")
        self.count: Tensor | None = None  # [B, V]
        self.seen: Tensor | None = None  # [B, V]

    @property
    def active(self) -> bool:
        return self.presence != 0 or self.frequency != 0

    def apply(self, logits: Tensor) -> Tensor:  # [B, V]
        """The logits minus the penalties."""
        if not self.active or self.count is None or self.seen is None:
            return logits
        return logits.float() - (self.seen * self.presence + self.count * self.frequency)

    def add(self, tokens: Tensor, logits: Tensor) -> None:  # [B], [B, V]
        """Counts the tokens just produced."""
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

    def select(self, rows: Tensor) -> None:  # [B'] int64
        """Keeps these rows only."""
        if self.count is not None and self.seen is not None:
            self.count, self.seen = self.count[rows], self.seen[rows]
