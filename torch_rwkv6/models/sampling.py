"""From logits to the next token, row by row: penalties, biases, the cuts and the temperature."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_rwkv6.arguments import integer, number, token, tokens

__all__ = [
    "Counts",
    "Penalties",
    "Sampler",
    "Sampling",
    "draw",
    "from_settings",
    "log_probabilities",
    "probabilities",
    "unusable",
]

NUCLEUS = 512  # the number of tokens that are looked at before all of the vocabulary are sorted
MOST = 2**62  # no vocabulary is as large: for tokens of a model that is not known yet


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    A token may come next if top_k, top_p and min_p all keep it, each of which looks at the softmax
    of the logits as they are, and if typical_p keeps it among what those leave. The probabilities
    of what is left are raised to the power 1 / temperature. (The order of ChatRWKV and of
    llama.cpp: the temperature comes last.) Equally likely tokens are in the order of their ids.

    Attributes:
        temperature: 0 takes the likeliest token; below 1 sharpens, above 1 flattens.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1], and all
            that are exactly as likely as the last of them; 1 is all.
        min_p: only tokens at least so likely as this share of the likeliest, in [0, 1]; 0 is all.
        typical_p: only the tokens whose surprise is closest to the expected one and that together
            reach this probability, in (0, 1]; 1 is all. (Meister et al., "Locally Typical
            Sampling", arXiv:2202.00666.)
        logit_bias: what is added to the logits of tokens, by token id; -inf bans a token.

    Raises:
        TypeError: no number, no integer as top_k, or no mapping of token ids.
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.85
    min_p: float = 0.0
    typical_p: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if number("temperature", self.temperature) < 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        object.__setattr__(self, "top_k", integer("top_k", self.top_k, 0))  # NumPy's, too
        if not 0 <= number("min_p", self.min_p) <= 1:
            raise ValueError(f"min_p: expected 0 to 1, got {self.min_p}")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if not 0 < number(name, value) <= 1:
                raise ValueError(f"{name}: expected more than 0 and at most 1, got {value}")
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(
                "logit_bias: expected a mapping of token ids to numbers, got "
                f"{type(self.logit_bias).__name__}"
            )
        bias = {
            token("logit_bias", t, MOST): b if b == -np.inf else number("logit_bias", b)
            for t, b in self.logit_bias.items()
        }
        object.__setattr__(self, "logit_bias", bias)


@dataclass(frozen=True)
class Penalties:
    """Repetition penalties as in ChatRWKV.

    A token that was produced n times, n > 0, loses ``alpha_presence + n * alpha_frequency`` from
    its logit; n is multiplied by ``alpha_decay`` with every token produced. (``PIPELINE.generate``
    of the package rwkv; ChatRWKV's own settings are 0.2, 0.2 and 0.996.)

    Attributes:
        alpha_presence, alpha_frequency, alpha_decay: the three settings; presence = frequency = 0
            is no penalty.
        free_tokens: tokens whose n stays 0: they lose ``alpha_presence`` alone. ChatRWKV frees
            white space and digits.

    Raises:
        TypeError: no number, or no collection of token ids.
        ValueError: a number that is not finite, or alpha_decay outside 0 to 1.
    """

    alpha_presence: float = 0.0
    alpha_frequency: float = 0.0
    alpha_decay: float = 0.996
    free_tokens: Collection[int] = ()

    def __post_init__(self) -> None:
        number("alpha_presence", self.alpha_presence)
        number("alpha_frequency", self.alpha_frequency)
        if not 0 <= number("alpha_decay", self.alpha_decay) <= 1:
            raise ValueError(f"alpha_decay: expected 0 to 1, got {self.alpha_decay}")
        free = frozenset(tokens("free_tokens", self.free_tokens, MOST))
        object.__setattr__(self, "free_tokens", free)


def from_settings(settings: Mapping[str, Any]) -> tuple[Sampling, Penalties]:
    """The `Sampling` and the `Penalties` that have these settings, whose names do not overlap.

    Raises:
        TypeError: there is no setting of a name.
    """
    kinds = (Sampling, Penalties)
    names = [[f.name for f in fields(kind)] for kind in kinds]
    for name in settings:
        if not any(name in own for own in names):
            known = ", ".join(n for own in names for n in own)
            raise TypeError(f"{name}: there is no such setting; expected one of {known}")
    sampling, penalties = ({n: settings[n] for n in own if n in settings} for own in names)
    return Sampling(**sampling), Penalties(**penalties)


class Counts:
    """What the penalties of one sequence count: how often it has produced each of its tokens."""

    def __init__(self, penalties: Penalties) -> None:
        self._penalties = penalties
        self._place: dict[int, int] = {}  # of a token in the arrays
        self._tokens = np.zeros(16, np.int64)
        self._n = np.zeros(16, np.float64)

    def add(self, token: int) -> None:
        """Counts a token just produced."""
        self._n *= self._penalties.alpha_decay
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._n):
            self._tokens = np.append(self._tokens, np.zeros_like(self._tokens))
            self._n = np.append(self._n, np.zeros_like(self._n))
        self._tokens[place] = token
        self._n[place] += token not in self._penalties.free_tokens

    def penalties(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The tokens produced, and what each loses."""
        size, settings = len(self._place), self._penalties
        loss = float(settings.alpha_presence) + self._n[:size] * float(settings.alpha_frequency)
        return self._tokens[:size], loss


class Sampler:
    """The probabilities with which the tokens of rows are drawn, of each by its own `Sampling`.

    The device of the logits finds the likeliest; NumPy, whose calls are short, does the rest.

    Args:
        samplings: one a row.
    """

    def __init__(self, samplings: Sequence[Sampling]) -> None:
        def column(values: Sequence[float], dtype: type) -> Any:
            return np.array(values, dtype)[:, None]

        self.greedy = all(s.temperature == 0 for s in samplings)
        self.typical = any(s.typical_p < 1 for s in samplings)
        # a temperature of 0 is a top_k of 1
        top_k = [1 if s.temperature == 0 else min(s.top_k or MOST, MOST) for s in samplings]
        self._most = max(top_k)
        off = np.inf  # for a share of 1, which rounding might not reach
        self._settings = (  # [B, 1] each
            column([max(s.temperature, 1e-30) for s in samplings], np.float32),
            column(top_k, np.int64),
            column([s.top_p if s.top_p < 1 else off for s in samplings], np.float64),
            column([s.min_p for s in samplings], np.float32),
            column([s.typical_p if s.typical_p < 1 else off for s in samplings], np.float32),
        )

    def __call__(
        self,
        logits: Tensor,  # [B, V]
    ) -> tuple[Tensor, Tensor]:  # [B, K], [B, K]
        """As `probabilities`; but a row from which nothing can be drawn is NaN."""
        logits = logits.float()
        if self.greedy:
            highest, best = logits.max(1, keepdim=True)  # NaN where a row holds one
            return (highest - highest + 1).cpu(), best.cpu()  # inf - inf is NaN
        vocab = logits.shape[1]
        logs = torch.log_softmax(logits, 1)
        size = min(NUCLEUS, vocab)
        with np.errstate(all="ignore"):  # of rows with NaN and infinities
            p, token, more = self._candidates(logits, logs, size, self._settings)
            if size < vocab and more.any():
                rows = more.nonzero()[0]
                index = torch.from_numpy(rows).to(logits.device)
                settings = tuple(x[rows] for x in self._settings)
                all_p, all_token, _ = self._candidates(logits[index], logs[index], vocab, settings)
                # The other rows get the rest of the vocabulary as well, which they never draw
                others = np.ones((len(p), vocab), bool)
                np.put_along_axis(others, token, False, 1)
                rest = others.nonzero()[1].reshape(len(p), vocab - size)
                token = np.concatenate((token, rest), 1)
                p = np.concatenate((p, np.zeros(rest.shape, p.dtype)), 1)
                p[rows], token[rows] = all_p, all_token
        return torch.from_numpy(p[:, : self._most]), torch.from_numpy(token[:, : self._most])

    def _candidates(
        self,
        logits: Tensor,  # [B, V]
        logs: Tensor,  # [B, V], the logarithm of their softmax
        size: int,  # K
        settings: tuple[Any, ...],  # [B, 1] each
    ) -> tuple[Any, Any, Any]:  # [B, K], [B, K], [B]
        """Probabilities and tokens of the likeliest, and where more than these may be drawn."""
        temperature, top_k, top_p, min_p, typical_p = settings
        token, log = _likeliest(logits, logs, size)
        p = np.exp(log)
        before = p.cumsum(1, dtype=np.float64) - p  # what the likelier tokens reach
        last = np.where(before >= top_p, np.inf, p).min(1, keepdims=True)  # that top_p keeps
        kept = (p >= np.maximum(last, min_p * p[:, :1])) & (p > 0) & (np.arange(size) < top_k)
        # Among those that are not here, there may be some as likely as the last that is kept
        more = p[:, -1] >= np.where(kept, p, np.inf).min(1)
        if self.typical:
            kept &= _typical(p, log, kept, typical_p)
        scores = np.where(kept, log, np.float32(-np.inf))
        p = np.exp((scores - scores.max(1, keepdims=True)) / temperature)
        return p / p.sum(1, keepdims=True), token, more


def _likeliest(
    logits: Tensor,  # [B, V]
    logs: Tensor,  # [B, V]
    size: int,  # K
) -> tuple[Any, Any]:  # [B, K], [B, K]
    """The tokens of the K highest logits, equal ones in ascending order, and their logs."""
    if size == logits.shape[1]:
        tokens = logits.argsort(dim=1, descending=True, stable=True)
        return tokens.cpu().numpy(), logs.gather(1, tokens).cpu().numpy()
    highest, tokens = logits.topk(size, 1)
    token, log = tokens.cpu().numpy(), logs.gather(1, tokens).cpu().numpy()
    value = highest.cpu().numpy()
    if (value[:, 1:] == value[:, :-1]).any():  # in an order that topk leaves open
        order = np.lexsort((token, -value))
        token, log = (np.take_along_axis(x, order, 1) for x in (token, log))
    return token, log


def _typical(
    p: Any,  # [B, K]
    log: Any,  # [B, K], of p
    kept: Any,  # [B, K] bool
    typical_p: Any,  # [B, 1]
) -> Any:  # [B, K] bool
    """Which tokens typical_p keeps among those kept so far."""
    q = np.where(kept, p, np.float32(0))
    mass = q.sum(1, keepdims=True)
    q, surprise = q / mass, np.log(mass) - log
    expected = np.where(kept, q * surprise, 0).sum(1, keepdims=True)  # the entropy
    distance = np.where(kept, np.abs(surprise - expected), np.inf)
    order = distance.argsort(1, kind="stable")
    reached = np.take_along_axis(q, order, 1).cumsum(1)
    last = (reached < typical_p).sum(1, keepdims=True).clip(max=q.shape[1] - 1)
    farthest = np.take_along_axis(distance, np.take_along_axis(order, last, 1), 1)
    return distance <= farthest


def probabilities(
    logits: Tensor,  # [B, V]
    sampling: Sampling | Sequence[Sampling],
) -> tuple[Tensor, Tensor]:  # [B, K], [B, K]
    """The tokens that may come next, likeliest first, and the probabilities they are drawn with.

    Args:
        logits: [B, V], of any floating-point dtype. A token whose logit is -inf is never drawn.
        sampling: the settings of all rows, or one for each; logit_bias is not added here.

    Returns:
        probabilities, [B, K] float32, zero where a row keeps fewer, and token ids, [B, K] int64,
        of which equally likely ones stand in ascending order; both on the CPU.

    Raises:
        FloatingPointError: logits hold NaN or inf, or nothing but -inf.
    """
    samplings = [sampling] * len(logits) if isinstance(sampling, Sampling) else sampling
    p, token = Sampler(samplings)(logits)
    bad = p[:, 0].isnan().nonzero()
    if len(bad):
        raise unusable(logits[int(bad[0])])
    return p, token


def unusable(
    logits: Tensor,  # [V]
) -> FloatingPointError:
    """The error for logits from which no token can be drawn."""
    found = logits.max().item()
    return FloatingPointError(
        f"logits: expected finite numbers, got {'NaN' if found != found else found}, from "
        "which no token can be drawn (where float16 overflows, bfloat16 does not)"
    )


def draw(
    p: Tensor,  # [B, K]
    token: Tensor,  # [B, K]
    generators: Sequence[torch.Generator],  # one a row; all on the CPU
) -> Tensor:  # [B]
    """One token per row, drawn with the row's own random number generator."""
    if p.shape[1] == 1:
        return token[:, 0]
    # not of the default dtype and device, which are the user's
    u = [torch.rand((), generator=g, dtype=torch.float32, device="cpu").item() for g in generators]
    total = p.numpy().cumsum(1)
    below = total <= np.array(u, np.float32)[:, None] * total[:, -1:]
    index = below.sum(1).clip(max=p.shape[1] - 1)
    return torch.from_numpy(token.numpy()[np.arange(len(index)), index])


def log_probabilities(
    logits: Tensor,  # [B, V]
    chosen: Tensor,  # [B]
    top: int,  # K
) -> tuple[list[float], list[list[tuple[int, float]]]]:  # B, and B of K
    """Log-probabilities of the chosen tokens and of the likeliest, in the softmax of the logits."""
    logs = torch.log_softmax(logits.float(), 1)
    chosen = chosen.to(logs.device)
    values, ids = logs.topk(min(top, logs.shape[1]), 1)
    likeliest = [
        list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return logs.gather(1, chosen[:, None])[:, 0].tolist(), likeliest
