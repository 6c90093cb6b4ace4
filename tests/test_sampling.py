"""The settings of sampling: each against its definition, and each row by its own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from checkpoints import random_model
from torch import Tensor

from torch_rwkv6 import generate
from torch_rwkv6.models import Penalties, Sampling
from torch_rwkv6.models.sampling import draw, from_settings, probabilities


def spread(vocab: int) -> Tensor:
    """Rows of logits from flat to sharp: [4, V]."""
    generator = torch.Generator().manual_seed(vocab)
    scale = torch.tensor([[0.1], [1.0], [3.0], [10.0]])
    return torch.randn(4, vocab, generator=generator) * scale


def dense(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probability of every token: [B, V]."""
    p, token = probabilities(logits, sampling)
    return torch.zeros_like(logits).scatter_(1, token, p)


@pytest.mark.parametrize("vocab", [50, 3000])
def test_min_p_and_typical_p_are_those_of_transformers(vocab: int) -> None:
    """Where there is no temperature, whose place in the order differs."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = spread(vocab)
    for sampling, warpers in (
        (Sampling(top_p=1.0, min_p=0.1), [process.MinPLogitsWarper(0.1)]),
        (Sampling(top_p=1.0, min_p=1.0), [process.MinPLogitsWarper(1.0)]),
        (Sampling(top_p=1.0, typical_p=0.2), [process.TypicalLogitsWarper(0.2)]),
        (Sampling(top_p=1.0, typical_p=0.9), [process.TypicalLogitsWarper(0.9)]),
        (
            Sampling(top_p=1.0, top_k=20, min_p=0.02, typical_p=0.7),
            [
                process.TopKLogitsWarper(20),
                process.MinPLogitsWarper(0.02),
                process.TypicalLogitsWarper(0.7),
            ],
        ),
    ):
        expected = logits
        for warper in warpers:
            expected = warper(torch.zeros(4, 1, dtype=torch.int64), expected)
        expected = torch.softmax(expected, 1)
        found = dense(logits, sampling)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        assert (found == 0).any()


def test_a_processor_of_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    model = random_model("6")
    greedy = {"temperature": 0, "max_tokens": 30}
    free = torch.cat(list(generate(model, [1], **greedy))).tolist()
    processors = [process.NoRepeatNGramLogitsProcessor(2)]
    found = torch.cat(list(generate(model, [1], processors=processors, **greedy))).tolist()

    def pairs(tokens: list[int]) -> list[tuple[int, int]]:
        return list(itertools.pairwise(tokens))

    assert len(set(pairs(free))) < 29
    assert len(set(pairs([1, *found]))) == 30


def test_the_temperature_comes_last() -> None:
    logits = spread(50)
    for temperature in (0.3, 3.0):
        cut = dense(logits, Sampling(top_p=0.9, min_p=0.05, typical_p=0.8))
        expected = cut ** (1 / temperature)
        found = dense(logits, Sampling(temperature, top_p=0.9, min_p=0.05, typical_p=0.8))
        torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[0.0, 300.0, 299.0]])
    for temperature in (1e-45, 1e-20, 1e-3):
        assert dense(logits, Sampling(temperature, top_p=1.0)).tolist() == [[0.0, 1.0, 0.0]]
    flat = dense(logits, Sampling(1e30, top_p=0.999))
    torch.testing.assert_close(flat, torch.tensor([[0.0, 0.5, 0.5]]))
    # the likeliest token is not typical, and what is left is sharpened all the same
    logits = torch.tensor([[2.0, *[-1.0] * 20, -1.1]])
    found = dense(logits, Sampling(1e-3, top_p=1.0, typical_p=0.3))
    assert found[0, 0] == 0
    assert found.sum() == pytest.approx(1.0)


def test_top_k_of_equally_likely_tokens_takes_the_first() -> None:
    logits = torch.zeros(1, 2000)
    logits[0, 1990] = 1.0
    _, token = probabilities(logits, Sampling(top_k=4, top_p=1.0))
    assert token[0, :4].tolist() == [1990, 0, 1, 2]
    for sampling in (Sampling(0.0), Sampling(top_k=1)):
        p, token = probabilities(logits[:, :1000], sampling)
        assert (p[0, 0], token[0, 0]) == (1.0, 0)


def test_each_row_has_its_own_settings() -> None:
    """What a row may draw, and draws, are those of the row alone, bit for bit."""
    samplings = [
        Sampling(),
        Sampling(0.0),
        Sampling(0.5, top_p=1.0),  # looks at all tokens, where the others need few
        Sampling(top_k=3),
        Sampling(top_k=700, top_p=1.0, min_p=0.3),
        Sampling(3.0, typical_p=0.4),
    ]
    logits = torch.randn(len(samplings), 5000, generator=torch.Generator().manual_seed(0)) * 3
    logits[1, 20] = logits[1].max()  # a tie
    p, token = probabilities(logits, samplings)
    seeds = range(len(samplings))
    drawn = draw(p, token, [torch.Generator().manual_seed(s) for s in seeds])
    for i, sampling in enumerate(samplings):
        own_p, own_token = probabilities(logits[i : i + 1], sampling)
        size = own_p.shape[1]
        assert torch.equal(p[i, :size], own_p[0])
        assert torch.equal(token[i, :size], own_token[0])
        assert not p[i, size:].any()
        assert draw(own_p, own_token, [torch.Generator().manual_seed(i)]) == drawn[i]


def test_settings_by_name() -> None:
    sampling, penalties = from_settings({"top_k": 3, "alpha_decay": 0.5, "min_p": 0.1})
    assert sampling == Sampling(top_k=3, min_p=0.1)
    assert penalties == Penalties(alpha_decay=0.5)
    with pytest.raises(TypeError, match="topk: there is no such setting; expected one of temper"):
        from_settings({"topk": 3})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"min_p": -0.1}, ValueError, "min_p: expected 0 to 1, got -0.1"),
        ({"min_p": 1.1}, ValueError, "min_p: expected 0 to 1, got 1.1"),
        ({"min_p": "1"}, TypeError, "min_p: expected a number"),
        ({"typical_p": 0.0}, ValueError, "typical_p: expected more than 0"),
        ({"typical_p": math.nan}, ValueError, "typical_p: expected a finite number"),
        ({"logit_bias": [1]}, TypeError, "logit_bias: expected a mapping of token ids to numbers"),
        ({"logit_bias": {"a": 1}}, TypeError, "logit_bias: expected integer token ids"),
        ({"logit_bias": {-1: 1}}, IndexError, "logit_bias: expected tokens from 0"),
        ({"logit_bias": {1: "x"}}, TypeError, "logit_bias: expected a number"),
        ({"logit_bias": {1: math.inf}}, ValueError, "logit_bias: expected a finite number"),
        ({"logit_bias": {1: math.nan}}, ValueError, "logit_bias: expected a finite number"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(
    settings: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Sampling(**settings)  # type: ignore[arg-type]
