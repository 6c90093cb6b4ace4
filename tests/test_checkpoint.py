"""Trained checkpoints: one of another project, and one of our own run by another implementation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy_rwkv6
import pytest
import torch

from torch_rwkv6.models import load
from torch_rwkv6.nn import RWKV, RWKV6

DATA = Path(__file__).parent / "data"
PROMPT = b"And God said, Let there be light"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A small model of examples/train_lm.py; tests/data/make_rwkv6_kjv.py tells how it was made."""
    weights = torch.load(DATA / "rwkv6-kjv.pth", weights_only=True)
    return {name: x.float() for name, x in weights.items()}


def test_logits_equal_those_of_the_rwkv_package(weights: dict[str, torch.Tensor]) -> None:
    expected = np.load(DATA / "rwkv6-kjv-expected-logits.npy")  # [T, V], every token of PROMPT
    model = load(weights)
    assert (model.n_layer, model.n_embd, model.head_size) == (2, 64, 32)
    with torch.no_grad():
        logits, _ = model(torch.tensor([list(PROMPT)]))
    np.testing.assert_allclose(logits[0].numpy(), expected, rtol=0, atol=1e-4)
    assert expected.argmax(1).tolist()[-8:] == logits[0].argmax(1).tolist()[-8:]


def test_the_numpy_oracle_equals_the_rwkv_package(weights: dict[str, torch.Tensor]) -> None:
    expected = np.load(DATA / "rwkv6-kjv-expected-logits.npy")
    found = numpy_rwkv6.logits({n: x.double().numpy() for n, x in weights.items()}, PROMPT)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_epsilon_of_the_group_norm_is_the_official_one(
    weights: dict[str, torch.Tensor],
) -> None:
    expected = np.load(DATA / "rwkv6-kjv-expected-logits.npy")
    model = load(weights, ln_x_eps=1e-5)
    with torch.no_grad():
        logits, _ = model(torch.tensor([list(PROMPT)]))
    assert np.abs(logits[0].numpy() - expected).max() > 1e-2


def test_the_model_has_learnt_its_text(weights: dict[str, torch.Tensor]) -> None:
    model = load(weights)
    text = torch.tensor([list(PROMPT)])
    with torch.no_grad():
        logits, _ = model(text[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits[0], text[0, 1:])
    assert loss < 2.0  # bytes drawn at random: ln 256 = 5.5


def check_splits(model: RWKV) -> None:
    """One piece, token by token and pieces of any length, two texts at a time: the same logits."""
    tokens = torch.tensor([list(PROMPT), list(PROMPT[::-1])])  # [2, T]
    with torch.no_grad():
        whole, last = model(tokens)
        for lengths in ([1] * len(PROMPT), [7, 1, 0, len(PROMPT) - 8], [len(PROMPT) - 1, 1]):
            state, pieces = None, []
            for piece in tokens.split(lengths, 1):
                logits, state = model(piece, state)
                pieces.append(logits)
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4)
            torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)
        alone, _ = model(tokens[1:])
    torch.testing.assert_close(alone, whole[1:], rtol=0, atol=1e-4)


def test_any_split_of_trained_weights(weights: dict[str, torch.Tensor]) -> None:
    check_splits(load(weights))


def test_bfloat16_and_decoding_agree_with_float32(weights: dict[str, torch.Tensor]) -> None:
    text = torch.tensor([list(PROMPT)])
    with torch.no_grad():
        logits, _ = load(weights)(text)
        model, state, rows = load(weights, dtype=torch.bfloat16), None, []
        for token in text.split(1, 1):
            row, state = model(token, state)
            rows.append(row)
    found = torch.cat(rows, 1).float()
    assert (found - logits).square().mean().sqrt() < 0.05 * logits.square().mean().sqrt()


@pytest.fixture
def tiny() -> Path:
    """The folder of trained checkpoints of RWKV/rwkv.cpp."""
    folder = os.environ.get("RWKV_TINY_CHECKPOINTS")
    if folder is None:
        pytest.skip("RWKV_TINY_CHECKPOINTS names no folder with rwkv6-3m.pth and others")
    return Path(folder)


@pytest.mark.parametrize(
    ("name", "version", "eps", "tolerance"),
    [
        ("rwkv4-660K", "4", None, 1e-5),
        ("rwkv5.2-730K", "5.2", 1e-5, 1e-5),  # trained with another epsilon
        # the weights are those of a quantised file, the logits those of the model before
        ("rwkv6-3m", "6", None, 0.08),
    ],
)
def test_checkpoints_of_rwkv_cpp(
    name: str, version: str, eps: float | None, tolerance: float, tiny: Path
) -> None:
    expected = np.load(tiny / f"{name}-expected-logits.npy")
    model = load(tiny / f"{name}.pth", ln_x_eps=eps)
    assert model.version == version
    tokens = torch.tensor([list(b'"in')])
    with torch.no_grad():
        logits = model(tokens)[0][0, -1].numpy()
    assert np.abs(logits - expected).max() < tolerance
    assert np.corrcoef(logits, expected)[0, 1] > 0.99999
    found = model.forward_(tokens, model.initial_state(1))[0].numpy()
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
    check_splits(model)


def test_the_hard_decays_of_a_trained_rwkv_6(tiny: Path) -> None:
    weights = torch.load(tiny / "rwkv6-3m.pth", weights_only=True)
    model = RWKV6(256, 12, 128, 8)
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        logits = model(torch.tensor([list(b'"in')]))[0][0, -1].numpy()
    exact = numpy_rwkv6.logits({n: x.numpy() for n, x in weights.items()}, b'"in')[-1]
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-4)
