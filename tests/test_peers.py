"""Other implementations on the same random weights: rwkv, and transformers for RWKV-4."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from checkpoints import L, hugging_face, random_model, random_tokens
from torch import Tensor

from torch_rwkv6.models import load, save
from torch_rwkv6.nn import RWKVState

os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}  # read when the package is imported
STEPS = 16


def states_of_rwkv(state: list[Tensor]) -> RWKVState:
    """Its list of tensors a layer: shift, what WKV keeps (three vectors in RWKV-4), shift."""
    each = len(state) // L
    layers = [state[i * each : (i + 1) * each] for i in range(L)]
    wkv = [layer[1] if each == 3 else torch.stack(layer[1:4]) for layer in layers]
    return RWKVState(
        torch.stack([layer[0] for layer in layers])[:, None],
        torch.stack(wkv)[:, None],
        torch.stack([layer[-1] for layer in layers])[:, None],
    )


@pytest.mark.parametrize("version", ["4", "5.0", "5.1", "5.2", "6"])
def test_logits_and_states_equal_those_of_the_rwkv_package(version: str, tmp_path: Path) -> None:
    rwkv = pytest.importorskip("rwkv.model")
    save(random_model(version), tmp_path / "model.pth")
    peer = rwkv.RWKV(str(tmp_path / "model.pth"), "cpu fp32", verbose=False)
    model = load(tmp_path / "model.pth")
    prompt, *steps = random_tokens(1, 24 + STEPS).split([24, *[1] * STEPS], 1)
    own = model.initial_state(1)
    with torch.no_grad():
        expected, peer_state = peer.forward(prompt[0].tolist(), None, full_output=True)
        logits, state = model(prompt)
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)
        model.forward_(prompt, own)
        for token in steps:
            expected, peer_state = peer.forward(token[0].tolist(), peer_state)
            logits, state = model(token, state)
            in_place = model.forward_(token, own)
            for found in (logits[0, -1], in_place[0]):
                assert (found - expected).norm() < 1e-4 * expected.norm()
            for found in (state, own):
                for x, y in zip(found, states_of_rwkv(peer_state), strict=True):
                    assert (x - y).norm() < 1e-4 * y.norm()


def test_rwkv_4_equals_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model("4")
    config = transformers.RwkvConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.n_embd,
        num_hidden_layers=L,
        intermediate_size=4 * model.n_embd,
        rescale_every=0,  # otherwise it halves its own weights
    )
    peer = transformers.RwkvForCausalLM(config).eval()
    peer.load_state_dict(hugging_face(model.state_dict()))
    tokens = random_tokens(2, 15)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], peer(tokens).logits, rtol=1e-4, atol=1e-4)
        # a single token with a state mixes up the rows of its batch: one row then
        first = peer(tokens[:1], use_cache=True)
        step = peer(tokens[:1, :1], state=first.state, use_cache=True).logits
        _, state = model(tokens[:1])
        torch.testing.assert_close(model(tokens[:1, :1], state)[0], step, rtol=1e-4, atol=1e-4)
    again = load(peer.state_dict())
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in again.state_dict().items())
