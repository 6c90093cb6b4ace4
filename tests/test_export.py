"""torch.export and torch.compile of models: any batch and length, prompts and decoding steps."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_model, random_tokens
from test_compile import assert_runs_elsewhere
from test_docs import CHECKPOINT, blocks
from test_one_door import with_int8_weights
from torch import Tensor, nn
from torch.export import Dim

from torch_rwkv6.models import save
from torch_rwkv6.nn import RWKV, RWKVState

VERSIONS = ("4", "6")


def assert_same(found: Any, expected: Any) -> None:
    found, expected = (torch.utils._pytree.tree_leaves(x) for x in (found, expected))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def saved_and_loaded(program: Any) -> Any:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


class Step(nn.Module):
    """A decoding step: the state is updated in place."""

    def __init__(self, model: RWKV) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: RWKVState) -> Tensor:
        return self.model.forward_(tokens, state)


def states_spec(batch: Any) -> Any:
    return RWKVState(*({1: batch} for _ in range(3)))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_of_any_batch_and_length(version: str, grad: bool) -> None:
    model = random_model(version, n_layer=2)
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=1, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(
            model, (random_tokens(2, 3),), dynamic_shapes=({0: batch, 1: length},)
        )
    run = saved_and_loaded(program).module()
    with torch.no_grad():
        for sizes in ((2, 3), (1, 1), (1, 5), (3, 1), (5, 7), (1, 8), (1, 9), (64, 2)):
            tokens = random_tokens(*sizes)
            logits, state = run(tokens)
            assert isinstance(state, RWKVState)
            assert_same((logits, state), model(tokens))


@pytest.mark.parametrize("version", VERSIONS)
def test_pieces_with_a_state(version: str) -> None:
    model = random_model(version, n_layer=2)
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=1, max=64)
    with torch.no_grad():
        example = (random_tokens(2, 3), model.initial_state(2))
        program = torch.export.export(
            model, example, dynamic_shapes=({0: batch, 1: length}, states_spec(batch))
        )
        run = saved_and_loaded(program).module()
        for rows in (1, 3, 9):
            state, own = model.initial_state(rows), model.initial_state(rows)
            for piece in random_tokens(rows, 7).split([4, 1, 2], 1):
                logits, state = model(piece, state)
                found, own = run(piece, own)
                assert_same((found, own), (logits, state))


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("version", VERSIONS)
def test_decoding_step_of_any_batch(version: str, strict: bool) -> None:
    model = random_model(version, n_layer=2)
    batch = Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(
            Step(model),
            (random_tokens(2, 1), model.initial_state(2)),
            dynamic_shapes=({0: batch}, states_spec(batch)),
            strict=strict,
        )
        run = saved_and_loaded(program).module()
        for rows in (1, 2, 8, 9, 20):
            state, own = model.initial_state(rows), model.initial_state(rows)
            for token in random_tokens(rows, 3).split(1, 1):
                assert_same((run(token, own), own), (model.forward_(token, state), state))


def test_inference_mode_exports_the_same() -> None:
    model, batch = random_model("6", n_layer=2), Dim("batch", min=1, max=64)
    with torch.inference_mode():
        program = torch.export.export(
            model, (random_tokens(2, 3),), dynamic_shapes=({0: batch, 1: Dim("length", max=64)},)
        )
    tokens = random_tokens(9, 2)
    with torch.no_grad():
        assert_same(program.module()(tokens), model(tokens))


def test_quantised_weights_compile_as_one_graph() -> None:
    torch._dynamo.reset()
    model, tokens = with_int8_weights(random_model("6", n_layer=2)), random_tokens(3, 5)
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(tokens)
        assert_same(found, model(tokens))


def test_compiling_makes_one_graph_for_all_sizes() -> None:
    torch._dynamo.reset()
    model, graphs = random_model("6", n_layer=2), list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for sizes in ((2, 3), (3, 5), (2, 2), (2, 4), (3, 3), (9, 9)):  # 4 to 81 tokens
            tokens = random_tokens(*sizes)
            assert_same(compiled(tokens), model(tokens))
    assert len(graphs) == 1


def test_a_program_needs_nothing_but_the_import(tmp_path: Path) -> None:
    """A prompt and a single token, of other sizes than the example's."""
    model = random_model("6", n_layer=2)
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=1, max=64)
    with torch.no_grad():
        example = (random_tokens(2, 3), model.initial_state(2))
        program = torch.export.export(
            model, example, dynamic_shapes=({0: batch, 1: length}, states_spec(batch))
        )
        torch.export.save(program, tmp_path / "model.pt2")
        calls, state = [], model.initial_state(3)
        for tokens in random_tokens(3, 6).split([5, 1], 1):
            results = model(tokens, state)
            calls.append(((tokens, state), results))
            _, state = results
    torch.save(calls, tmp_path / "data.pt")
    script = """
import sys, torch, torch_rwkv6
run = torch.export.load(sys.argv[1]).module()
for inputs, expected in torch.load(sys.argv[2]):
    found = run(*inputs)
    assert isinstance(found[1], torch_rwkv6.nn.RWKVState)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
"""
    files = [str(tmp_path / name) for name in ("model.pt2", "data.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, timeout=120)


def test_an_aotinductor_package_needs_only_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of the documentation: prompts and single tokens, with a state."""
    monkeypatch.chdir(tmp_path)
    model = random_model("6", n_layer=1)
    save(model, CHECKPOINT)
    program, _, package = blocks("docs/export.md")
    exec(program + package, {})
    calls = []
    with torch.no_grad():
        for rows in (1, 3):
            state = model.initial_state(rows)
            for tokens in random_tokens(rows, 6).split([5, 1], 1):
                logits, new = model(tokens, state)
                calls.append(((tokens.contiguous(), *state), (logits, *new)))
                state = new
    assert_runs_elsewhere("model-aoti.pt2", calls, tmp_path)


def test_saved_states_load_as_they_are(tmp_path: Path) -> None:
    _, state = random_model("6", n_layer=2)(random_tokens(2, 3))
    state = state.detach()
    torch.save({"state": state, "step": 3}, tmp_path / "state.pt")
    for options in ({}, {"weights_only": True}, {"mmap": True}, {"map_location": "cpu"}):
        found = torch.load(tmp_path / "state.pt", **options)["state"]
        assert isinstance(found, RWKVState)
        for x, y in zip(found, state, strict=True):
            assert torch.equal(x, y)
