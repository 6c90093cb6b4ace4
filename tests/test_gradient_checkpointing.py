"""Gradient checkpointing: the same gradients; blocks are computed twice, WKV once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from checkpoints import random_model, random_tokens
from samples import relative_rms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rwkv6.nn import RWKV


class Counted(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        self.calls[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def gradients(model: RWKV) -> tuple[dict[str, Tensor], Counter[str], Counter[str]]:
    """And the calls of the forward and of the backward pass."""
    tokens = random_tokens(2, 7)
    model.zero_grad()
    with Counted() as forward:
        state, total = None, torch.zeros(())
        for piece in tokens.split([4, 3], 1):
            logits, state = model(piece, state)
            total = total + logits.square().mean()
        total = total + state.wkv.square().mean()
    with Counted() as backward:
        total.backward()
    return {n: p.grad for n, p in model.named_parameters()}, forward.calls, backward.calls


@pytest.mark.parametrize("version", ["4", "5.2", "6"])
def test_the_same_gradients_from_blocks_computed_twice(version: str) -> None:
    model = random_model(version, n_layer=2)
    expected, once, backward = gradients(model)
    assert {"sigmoid", "relu", "native_layer_norm"} <= once.keys() - backward.keys()
    model.gradient_checkpointing = True
    found, forward, again = gradients(model)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
    wkv = {name for name in once if name.startswith("wkv")}
    assert wkv
    for name in once:
        if name in wkv:
            assert (forward[name], again[name]) == (once[name], 0)
        elif name in ("sigmoid", "relu", "native_layer_norm"):  # that of ln_out is not in a block
            outside = 2 * (name == "native_layer_norm")
            assert (forward[name], again[name]) == (once[name], once[name] - outside)


def test_pieces_of_one_sequence_under_autocast() -> None:
    """Whose cache of cast weights is empty when the backward pass begins."""
    model, tokens, found = random_model("6", n_layer=2), random_tokens(2, 7), []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            first, state = model(tokens[:, :4])
            second, _ = model(tokens[:, 4:], state)
        (first.float().square().mean() + second.float().square().mean()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(relative_rms(y, x) < 0.02 for x, y in zip(*found, strict=True))


def test_inference_is_as_it_was() -> None:
    model = random_model("6", n_layer=2)
    tokens, state = random_tokens(2, 3), model.initial_state(2)
    with torch.no_grad():
        expected = model(tokens)[0]
        model.gradient_checkpointing = True
        assert torch.equal(model(tokens)[0], expected)
    torch.testing.assert_close(model.forward_(tokens, state), expected[:, -1])
