"""torch_rwkv6.nn against a NumPy model of its own, and the promises of its docstrings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import numpy_rwkv6
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torch_rwkv6.models import load
from torch_rwkv6.nn import RWKV6, ChannelMix, RWKVState, TimeMix, parameter_groups

V, L, D, N = 37, 3, 24, 8


def random_model(**options: object) -> RWKV6:
    """Every parameter random: the official initial values make most of the model a no-op."""
    options = {"vocab_size": V, "n_layer": L, "n_embd": D, "head_size": N} | options
    torch.manual_seed(0)
    model = RWKV6(**options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "emb.weight":
                p.normal_()
            elif "ln" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            elif name.endswith("time_decay"):
                p.uniform_(-6, 1.5)
            elif p.dim() == 2 and "time_" not in name:
                p.normal_(std=p.shape[1] ** -0.5)
            else:
                p.normal_(std=0.3)
    return model


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def oracle(model: RWKV6, tokens: Tensor) -> np.ndarray:
    weights = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    return np.stack([numpy_rwkv6.logits(weights, row) for row in tokens.tolist()])


def relative_rms(x: Tensor, expected: np.ndarray) -> float:
    error = x.detach().double().numpy() - expected
    return float(np.sqrt(np.square(error).mean() / np.square(expected).mean()))


def assert_states_close(a: RWKVState, b: RWKVState, **tolerance: float) -> None:
    for name, x, y in zip(RWKVState._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# ---- the model against the oracle


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.08)]
)
def test_logits_equal_the_numpy_model(dtype: torch.dtype, tolerance: float) -> None:
    model = random_model().to(dtype)
    tokens = random_tokens(2, 40)
    logits, state = model(tokens)
    assert logits.dtype == state.att_shift.dtype == state.ffn_shift.dtype == dtype
    assert state.wkv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = oracle(model, tokens)
    assert expected.std() > 0.5  # a model that says something
    assert relative_rms(logits, expected) < tolerance


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 1},
        {"head_size": D},
        {"head_size": 1, "n_embd": 5, "n_ffn": 9},
        {"n_ffn": 7, "lora_mix": 3, "lora_decay": 5},
        {"train_state": True},
    ],
    ids=str,
)
def test_every_size_equals_the_numpy_model(sizes: dict[str, int]) -> None:
    model = random_model(**sizes).double()
    tokens = random_tokens(2, 9)
    assert relative_rms(model(tokens)[0], oracle(model, tokens)) < 1e-12


def test_autocast_computes_in_bfloat16_and_keeps_w_and_the_state() -> None:
    model, tokens = random_model(), random_tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens)
        again, _ = model(tokens[:, :3], state)  # its own state is accepted
    assert logits.dtype == again.dtype == torch.bfloat16
    assert state.wkv.dtype == torch.float32
    assert relative_rms(logits, oracle(model, tokens)) < 0.08
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- names, sizes, initial values


def test_official_names_and_counts() -> None:
    model = RWKV6(V, L, 64, 32)
    shapes = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    d, heads, mix, decay, ffn = 64, 2, 32, 64, 224
    expected = {"emb.weight": (V, d), "head.weight": (V, d)}
    for name in ["ln_out", "blocks.0.ln0"]:
        expected |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    for i in range(L):
        for name in ["ln1", "ln2", "att.ln_x"]:
            expected |= {f"blocks.{i}.{name}.{w}": (d,) for w in ("weight", "bias")}
        for name in "xwkvrg":
            expected[f"blocks.{i}.att.time_maa_{name}"] = (1, 1, d)
        for name in ["receptance", "key", "value", "output", "gate"]:
            expected[f"blocks.{i}.att.{name}.weight"] = (d, d)
        expected |= {
            f"blocks.{i}.att.time_maa_w1": (d, 5 * mix),
            f"blocks.{i}.att.time_maa_w2": (5, mix, d),
            f"blocks.{i}.att.time_decay": (1, 1, d),
            f"blocks.{i}.att.time_decay_w1": (d, decay),
            f"blocks.{i}.att.time_decay_w2": (decay, d),
            f"blocks.{i}.att.time_faaaa": (heads, 32),
            f"blocks.{i}.ffn.time_maa_k": (1, 1, d),
            f"blocks.{i}.ffn.time_maa_r": (1, 1, d),
            f"blocks.{i}.ffn.key.weight": (ffn, d),
            f"blocks.{i}.ffn.receptance.weight": (d, d),
            f"blocks.{i}.ffn.value.weight": (d, ffn),
        }
    assert shapes == expected
    assert len(shapes) == 28 * L + 6


@pytest.mark.parametrize(
    ("vocab", "layers", "width", "parameters"),
    [(65536, 24, 2048, 1_599_873_024), (256, 2, 128, 2 * (13 * 128**2 + 464 * 128) + 516 * 128)],
)
def test_parameter_count(vocab: int, layers: int, width: int, parameters: int) -> None:
    with torch.device("meta"):
        model = RWKV6(vocab, layers, width)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_lora_ranks_grow_at_width_4096() -> None:
    with torch.device("meta"):
        att = TimeMix(4096, 0, 2)
    assert att.time_maa_w2.shape == (5, 64, 4096)
    assert att.time_decay_w2.shape == (128, 4096)


@pytest.mark.parametrize(("layer", "layers"), [(0, 3), (1, 3), (2, 3), (0, 1)])
def test_initial_values_follow_the_official_formulas(layer: int, layers: int) -> None:
    block = RWKV6(V, layers, D, N).blocks[layer]
    r01 = layer / (layers - 1) if layers > 1 else 0.0
    r10 = 1 - layer / layers
    channels = [i / D for i in range(D)]
    values = {
        "time_maa_x": [1 - c**r10 for c in channels],
        "time_maa_w": [1 - c**r10 for c in channels],
        "time_maa_k": [1 - c**r10 for c in channels],
        "time_maa_v": [1 - (c**r10 + 0.3 * r01) for c in channels],
        "time_maa_r": [1 - c ** (0.5 * r10) for c in channels],
        "time_maa_g": [1 - c ** (0.5 * r10) for c in channels],
        "time_decay": [-6 + 5 * (n / (D - 1)) ** (0.7 + 1.3 * r01) for n in range(D)],
        "time_faaaa": [r01 * (1 - n / (D - 1)) + ((n + 1) % 3 - 1) * 0.1 for n in range(D)],
        "time_maa_w1": [0.0] * (D * 160),
        "time_decay_w1": [0.0] * (D * 64),
        "output.weight": [0.0] * (D * D),
        "ln_x.weight": [((1 + layer) / layers) ** 0.7] * D,
        "ln_x.bias": [0.0] * D,
    }
    att = dict(block.att.named_parameters())
    for name, value in values.items():
        expected = torch.tensor(value)
        torch.testing.assert_close(att[name].detach().flatten(), expected, rtol=0, atol=2e-6)
    for name in ("time_maa_w2", "time_decay_w2"):
        assert 0.009 < att[name].abs().max() <= 0.01
    ffn = torch.tensor([1 - c ** (r10**3) for c in channels])
    for p in (block.ffn.time_maa_k, block.ffn.time_maa_r):
        torch.testing.assert_close(p.detach().flatten(), ffn, rtol=0, atol=2e-6)
    assert not block.ffn.receptance.weight.any()
    assert not block.ffn.value.weight.any()
    for weight, gain in (
        (att["receptance.weight"], 1.0),
        (att["value.weight"], 1.0),
        (att["key.weight"], 0.1),
        (att["gate.weight"], 0.1),
        (block.ffn.key.weight, 1.0),
    ):
        torch.testing.assert_close(weight.T @ weight, gain**2 * torch.eye(D), rtol=0, atol=1e-5)


def test_initial_values_of_embedding_and_head() -> None:
    model = RWKV6(4 * D, 1, D, N)
    assert 0.9e-4 < model.emb.weight.abs().max() <= 1e-4
    head = model.head.weight  # orthogonal, gain 0.5 * sqrt(V / D) = 1
    torch.testing.assert_close(head.T @ head, torch.eye(D), rtol=0, atol=1e-5)
    head = RWKV6(D // 2, 1, D, N).head.weight  # V < D: gain 0.5
    torch.testing.assert_close(head @ head.T, 0.25 * torch.eye(D // 2), rtol=0, atol=1e-5)


def test_parameter_groups_follow_the_official_rules() -> None:
    model = random_model(train_state=True)
    model.emb.requires_grad_(False)
    names = {p: n for n, p in model.named_parameters()}
    groups = {g["name"]: g for g in model.parameter_groups(1e-3, 0.1)}
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [
        (2e-3, 0.0),
        (1e-3, 0.1),
        (1e-3, 0.0),
    ]
    found = {group: {names[p] for p in groups[group]["params"]} for group in groups}
    layers = range(L)
    assert found["decay_speed"] == {f"blocks.{i}.att.time_decay" for i in layers}
    att = ["receptance.weight", "key.weight", "value.weight", "gate.weight", "output.weight"]
    ffn = ["key.weight", "receptance.weight", "value.weight"]
    assert found["matrices"] == (
        {"head.weight"}
        | {f"blocks.{i}.att.{n}" for i in layers for n in [*att, "time_state"]}
        | {f"blocks.{i}.ffn.{n}" for i in layers for n in ffn}
    )
    rest = set(names.values()) - found["decay_speed"] - found["matrices"] - {"emb.weight"}
    assert found["rest"] == rest
    torch.optim.AdamW(list(groups.values()))
    frozen = RWKV6(V, 1, D, N).requires_grad_(False)
    assert parameter_groups(frozen, 1e-3) == []


# ---- the state


@pytest.mark.parametrize("pieces", [[1] * 20, [20], [0, 7, 0, 12, 1, 0], [19, 1]], ids=str)
def test_any_split_gives_the_logits_and_state_of_the_whole(pieces: list[int]) -> None:
    model, tokens = random_model(), random_tokens(3, 20)
    with torch.no_grad():
        whole, last = model(tokens)
        state, logits = None, []
        for piece in tokens.split(pieces, 1):
            out, state = model(piece, state)
            logits.append(out)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-4)
    assert_states_close(state, last, rtol=1e-4, atol=1e-4)


def test_no_tokens_leave_the_state_as_it_is() -> None:
    model = random_model(train_state=True)
    none = torch.empty(2, 0, dtype=torch.int64)
    logits, start = model(none)
    assert logits.shape == (2, 0, V)
    assert_states_close(start, model.initial_state(2), rtol=0, atol=0)
    state = model(random_tokens(2, 5))[1]
    assert_states_close(model(none, state)[1], state, rtol=0, atol=0)


def test_the_callers_state_is_not_changed() -> None:
    model = random_model()
    state = model(random_tokens(2, 5))[1]
    before = state.clone()
    model(random_tokens(2, 4), state)
    assert_states_close(state, before, rtol=0, atol=0)


def test_gradient_through_the_carried_state_is_that_of_the_whole() -> None:
    model, tokens = random_model().double(), random_tokens(2, 12)

    def gradients(pieces: list[int], detach: bool = False) -> dict[str, Tensor]:
        model.zero_grad()
        state, loss = None, torch.zeros((), dtype=torch.float64)
        for piece in tokens.split(pieces, 1):
            logits, state = model(piece, state)
            loss = loss + cross_entropy(logits.flatten(0, 1), piece.flatten(), reduction="sum")
            state = state.detach() if detach else state
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole = gradients([12])
    assert len(whole) == 28 * L + 6
    for name, x in gradients([5, 1, 6]).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-8, atol=1e-10, msg=name)
    cut = gradients([5, 1, 6], detach=True)  # another gradient: the history ends at each piece
    assert (cut["emb.weight"] - whole["emb.weight"]).abs().max() > 1e-3


def test_state_rows_can_be_selected_and_joined() -> None:
    model, tokens = random_model(), random_tokens(3, 6)
    _, state = model(tokens)
    chosen = state.select([2, 0, 2])
    assert chosen.wkv.shape == (L, 3, D // N, N, N)
    _, expected = model(tokens[[2, 0, 2]])
    assert_states_close(chosen, expected, rtol=1e-5, atol=1e-5)
    assert_states_close(state.select(torch.tensor([1], dtype=torch.int32)), state.select([1]))
    assert state.select([]).att_shift.shape == (L, 0, D)
    rows = [state.select([i]) for i in range(3)]
    assert_states_close(RWKVState.cat(rows), state, rtol=0, atol=0)
    with pytest.raises(IndexError):
        state.select([3])


def test_state_methods_return_new_states() -> None:
    _, state = random_model()(random_tokens(2, 6))
    assert state.wkv.requires_grad
    assert not state.detach().wkv.requires_grad
    copied = state.detach().clone()
    copied.wkv.zero_()
    assert state.wkv.any()
    half = state.to(dtype=torch.bfloat16)
    assert [x.dtype for x in half] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert [x.dtype for x in state.to(dtype=torch.float64)] == [torch.float64] * 3
    assert [x.device.type for x in state.to("meta")] == ["meta"] * 3
    leaves, _ = torch.utils._pytree.tree_flatten(state)
    assert len(leaves) == 3  # torch.compile and torch.export see the tensors


def test_state_tuning_trains_time_state_and_nothing_else() -> None:
    model = random_model(train_state=True)
    torch.nn.init.zeros_(model.blocks[1].att.time_state)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("time_state"))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.05))
    tokens, losses = random_tokens(4, 10), []
    for _ in range(20):
        logits, _ = model(tokens[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    changed = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert changed == {f"blocks.{i}.att.time_state" for i in range(L)}


def test_the_initial_state_is_what_none_stands_for() -> None:
    model, tokens = random_model(train_state=True), random_tokens(2, 7)
    logits, state = model(tokens)
    same, same_state = model(tokens, model.initial_state(2))
    torch.testing.assert_close(same, logits)
    assert_states_close(same_state, state, rtol=1e-4, atol=1e-4)
    zeros = RWKVState(*(torch.zeros_like(x) for x in state))
    assert (model(tokens, zeros)[0] - logits).abs().max() > 1e-3
    grads = torch.autograd.grad(same.sum(), [b.att.time_state for b in model.blocks])
    for x, y in zip(
        grads,
        torch.autograd.grad(logits.sum(), [b.att.time_state for b in model.blocks]),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_features_are_what_the_head_reads() -> None:
    model, tokens = random_model(), random_tokens(2, 5)
    x, state = model.features(tokens)
    assert x.shape == (2, 5, D)
    logits, expected = model(tokens)
    torch.testing.assert_close(model.head(x), logits)
    assert_states_close(state, expected)


# ---- compiled


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, tokens = random_model(n_layer=1, train_state=True), random_tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    state, compiled_state = None, None
    for piece in tokens.split([6, 5, 1], 1):
        logits, state = model(piece, state)
        compiled_logits, compiled_state = compiled(piece, compiled_state)
        torch.testing.assert_close(compiled_logits, logits, rtol=1e-4, atol=1e-4)
        assert_states_close(compiled_state, state, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(logits.sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled_logits.sum(), list(model.parameters()))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


# ---- checkpoints


def test_state_dict_round_trip() -> None:
    model = random_model(n_ffn=40, lora_mix=4, lora_decay=6, train_state=True)
    weights = model.state_dict()
    again = load(weights)
    assert all(torch.equal(x, weights[n]) for n, x in again.state_dict().items())
    assert all(p.requires_grad for p in again.parameters())
    assert again.emb.weight.data_ptr() != weights["emb.weight"].data_ptr()
    tokens = random_tokens(1, 5)
    torch.testing.assert_close(again(tokens)[0], model(tokens)[0])
    assert load(weights, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    half = {n: x.to(torch.bfloat16) for n, x in weights.items()}
    assert {p.dtype for p in load(half).parameters()} == {torch.bfloat16}


def test_train_state_starts_at_zero_where_the_checkpoint_has_none() -> None:
    model = random_model()
    tuned = load(model.state_dict(), train_state=True)
    assert all(not block.att.time_state.any() for block in tuned.blocks)
    tokens = random_tokens(2, 5)
    torch.testing.assert_close(tuned(tokens)[0], model(tokens)[0])


def test_a_checkpoint_that_does_not_fit_is_refused_with_a_full_list() -> None:
    weights = random_model().state_dict()
    del weights["ln_out.bias"], weights["blocks.0.att.time_faaaa"]
    weights["extra"] = torch.zeros(2)
    weights["blocks.2.att.time_decay"] = torch.zeros(D // 2)
    with pytest.raises(ValueError) as error:
        load(weights)
    for line in (
        "4 tensors do not fit",
        "missing ln_out.bias (24,)",
        "missing blocks.0.att.time_faaaa (3, 8)",
        "unexpected extra (2,)",
        "blocks.2.att.time_decay expected (1, 1, 24), got (12,)",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["att.x_r", "att.w0", "att.r_k"], "RWKV-7"),
        (["att.time_maa_w1", "att.gate_w1"], "x060a"),
        (["att.time_maa_rkvw_w1", "att.time_maa_x"], "x060b or x060c"),
    ],
)
def test_another_version_is_named(names: list[str], message: str) -> None:
    weights = {f"blocks.0.{name}": torch.zeros(4, 4) for name in names}
    weights["emb.weight"] = torch.zeros(V, 4)
    with pytest.raises(ValueError, match=f"or RWKV-6 .x060., got .*{message}"):
        load(weights)


def test_what_is_no_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"time_mix_k nor .*it has model\.embeddings.weight"):
        load({"model.embeddings.weight": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="it has nothing"):
        load({})
    with pytest.raises(TypeError, match="mapping of names"):
        load([torch.zeros(2)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got torch\.int8 as head\.weight"):
        load({"head.weight": torch.zeros(2, dtype=torch.int8)})
    weights = random_model().state_dict()
    weights["emb.weight"] = torch.zeros(V * D)
    with pytest.raises(ValueError, match=r"matrix as emb.weight.*got shape \(888,\)"):
        load(weights)


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_size": 7}, "head_size: expected a divisor of n_embd = 24, got 7"),
        ({"head_size": 0}, "head_size"),
        ({"head_size": 512, "n_embd": 512}, "head_size: expected 1 to 256, got 512"),
        ({"n_layer": 0}, "n_layer: expected 1 or more, got 0"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"lora_mix": 0}, "lora_mix"),
        ({"lora_decay": -1}, "lora_decay"),
        ({"n_ffn": 0}, "n_ffn"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_model(**options)


@pytest.mark.parametrize("name", ["vocab_size", "n_layer", "n_embd", "head_size", "lora_mix"])
@pytest.mark.parametrize("value", [1.5, 16.0, "16", True], ids=repr)
def test_sizes_that_are_no_integers(name: str, value: Any) -> None:
    sizes = {"vocab_size": 16, "n_layer": 1, "n_embd": 16, "head_size": 8}
    with pytest.raises(TypeError, match=f"{name}: expected an integer, got"):
        RWKV6(**(sizes | {name: value}))


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_an_epsilon_that_is_none(value: float) -> None:
    with pytest.raises(ValueError, match="ln_x_eps: expected"):
        RWKV6(16, 1, 16, 8, ln_x_eps=value)


@pytest.mark.parametrize("layer", [TimeMix, ChannelMix])
def test_layer_id_beyond_the_last(layer: type[TimeMix] | type[ChannelMix]) -> None:
    with pytest.raises(ValueError, match="layer_id: expected 0 to 1, got 2"):
        layer(64, 2, 2)


def test_batch_sizes_of_a_state() -> None:
    model = random_model()
    assert model.initial_state(0).wkv.shape[1] == 0
    with pytest.raises(ValueError, match="batch_size: expected 0 or more, got -1"):
        model.initial_state(-1)
    with pytest.raises(TypeError, match=r"batch_size: expected an integer, got 1\.5"):
        model.initial_state(1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["4", "5.2", "6"])
@pytest.mark.parametrize("length", [1, 3])
def test_a_state_whose_memory_is_shared_is_not_updated(version: str, length: int) -> None:
    """One tensor as both shifts, expanded layers: refused before anything is written. Two halves
    of one buffer share nothing and are right."""
    model, tokens = checkpoints.random_model(version), checkpoints.random_tokens(2, length)
    state = model.initial_state(2)
    expected = model.forward_(tokens, state.clone())
    one_layer = state.att_shift[:1].expand_as(state.att_shift)
    for bad, message in (
        (state._replace(ffn_shift=state.att_shift), "shares memory with state.ffn_shift"),
        (state._replace(att_shift=one_layer), "state.att_shift: .*expanded view"),
    ):
        before = [x.clone() for x in bad]
        with pytest.raises(ValueError, match=message):
            model.forward_(tokens, bad)
        assert all(torch.equal(x, y) for x, y in zip(bad, before, strict=True))
    halves = torch.cat((state.att_shift, state.ffn_shift), -1).chunk(2, -1)
    own = RWKVState(halves[0], state.wkv, halves[1])
    torch.testing.assert_close(model.forward_(tokens, own), expected)


def test_rows_of_a_state_that_are_none() -> None:
    state = random_model().initial_state(2)
    with pytest.raises(TypeError, match=r"rows: expected int32 or int64 .*torch\.bool"):
        state.select([True, False])
    for rows in (1, [[0, 1], [1, 0]]):
        with pytest.raises(ValueError, match="rows: expected "):
            state.select(rows)  # type: ignore[arg-type]
    for rows in (None, "0", [[0], [1, 0]]):
        with pytest.raises(TypeError, match="rows: expected a list of int"):
            state.select(rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="states: expected at least one, got none"):
        RWKVState.cat([])
    with pytest.raises(TypeError, match="dtype: expected a floating-point"):
        state.to(dtype=torch.int32)


def test_files_that_hold_no_state(tmp_path: Path) -> None:
    model, path = random_model(), tmp_path / "state.pth"
    for folder in ("none/state.pth", "none/state.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*none"):
            model.initial_state(1).save(tmp_path / folder)
    with pytest.raises(FileNotFoundError):
        RWKVState.load(path)
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="is no saved RWKVState, but a GGUF file"):
        RWKVState.load(path)
    torch.save(model, path)
    with pytest.raises(
        ValueError, match="is no saved RWKVState: it holds Python objects"
    ) as caught:
        RWKVState.load(path)
    assert "weights_only" not in str(caught.value)
    path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"is no saved RWKVState, .*it ends too early or is damaged"
    ):
        RWKVState.load(path)
    torch.save(dict.fromkeys(RWKVState._fields, 1), path)
    with pytest.raises(ValueError, match="expected floating-point tensors"):
        RWKVState.load(path)
    model.initial_state(1).save(path)
    with pytest.raises(ValueError, match="device: expected one of this machine, got none"):
        RWKVState.load(path, "none")


def test_tokens_that_do_not_fit() -> None:
    model = random_model()
    with pytest.raises(TypeError, match=r"tokens: expected a torch\.Tensor, got list"):
        model([[1, 2]])
    with pytest.raises(TypeError, match=r"tokens: expected int64 or int32 .* got torch\.float32"):
        model(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"tokens: expected \[B, T\], got shape \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    for token in (-1, V):
        with pytest.raises(IndexError):
            model(torch.tensor([[token]]))
    torch.testing.assert_close(
        *(model(random_tokens(1, 3).to(t))[0] for t in (torch.int32, torch.int64))
    )


def test_states_that_do_not_fit() -> None:
    model, tokens = random_model(), random_tokens(2, 3)
    state = model(tokens)[1]
    with pytest.raises(TypeError, match="state: expected an RWKVState, got tuple"):
        model(tokens, tuple(state))
    with pytest.raises(ValueError, match=r"state.att_shift: expected \[L, B, D\] = \(3, 2, 24\)"):
        model(tokens, state.select([0]))
    with pytest.raises(ValueError, match=r"state.wkv: .* \(3, 2, 3, 8, 8\), got \(3, 2, 3, 8, 4\)"):
        model(tokens, state._replace(wkv=state.wkv[..., :4]))
    with pytest.raises(ValueError, match=r"state\.ffn_shift"):
        model(tokens, state._replace(ffn_shift=state.ffn_shift[:1]))
    with pytest.raises(TypeError, match=r"state\.wkv: expected torch.float32, got torch.bfloat16"):
        model(tokens, state._replace(wkv=state.wkv.bfloat16()))
    with pytest.raises(TypeError, match=r"state\.att_shift: expected a torch.Tensor, got NoneType"):
        model(tokens, state._replace(att_shift=None))
    with pytest.raises(TypeError, match=r"state\.ffn_shift: expected floating-point values"):
        model(tokens, state._replace(ffn_shift=state.ffn_shift.to(torch.complex64)))
    with pytest.raises(ValueError, match=r"state\.wkv: expected device cpu, got meta"):
        model(tokens, state._replace(wkv=state.wkv.to("meta")))
