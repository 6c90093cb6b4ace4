"""The operator that takes one token through a layer of RWKV-6, against the layer's modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoints import random_model
from torch import Tensor, nn

from torch_rwkv6.nn import RWKV, RWKV6, RWKVState, decode
from torch_rwkv6.nn.decode import decode_

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LARGE = (50, 2, 516, 12)  # vocabulary, layers, width, head size: no whole vectors, several threads


def large_model(dtype: torch.dtype) -> RWKV6:
    torch.manual_seed(0)
    model = RWKV6(*LARGE, n_ffn=530, lora_mix=7, lora_decay=5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.to(dtype)


def layer_of(model: RWKV, batch: int) -> tuple[Tensor, list[Tensor]]:
    """Random input of a layer, [B, 1, D], and its states."""
    torch.manual_seed(1)
    dtype = model.emb.weight.dtype
    states = [torch.randn(s[0].shape).to(s.dtype) for s in model.initial_state(batch)]
    return torch.randn(batch, 1, model.n_embd).to(dtype), states


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@torch.no_grad()
def test_a_layer_is_what_its_modules_are(dtype: torch.dtype, batch: int, two_threads: None) -> None:
    for model in (random_model("6", dtype), large_model(dtype)):
        for block in model.blocks:
            x, states = layer_of(model, batch)
            given = [x, *(s.clone() for s in states)]
            found = decode_(block, x, *states)
            assert found is not None
            block.ln0 = None  # forward_ has it in front of the operator
            expected = block(*given)
            for a, b in zip((found, *states), expected, strict=True):
                assert a.dtype == b.dtype
                error = (a.double() - b.double()).norm() / b.double().norm()
                assert error < TOLERANCE[dtype]
            assert torch.equal(x, given[0])

            torch.set_num_threads(1)  # the same bits, and in every row those of the row alone
            alone = [given[0][:1], *(s[:1].clone() for s in given[1:])]
            assert torch.equal(decode_(block, *alone), found[:1])
            for a, b in zip(alone[1:], states, strict=True):
                assert torch.equal(a, b[:1])
            torch.set_num_threads(2)


@torch.no_grad()
def test_nan_and_large_inputs() -> None:
    model = random_model("6")
    block = model.blocks[1]
    x, states = layer_of(model, 2)
    x[0, 0, 5] = torch.nan
    y = decode_(block, x, *states)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    block.att.gate.weight.mul_(1e4)
    x, states = layer_of(model, 2)
    given = [x, *(s.clone() for s in states)]
    found = decode_(block, x, *states)
    torch.testing.assert_close(found, block(*given)[0], rtol=1e-4, atol=1e-3)


def test_python_and_c_name_the_parameters_in_one_order() -> None:
    """The operator takes them by position; their names stand beside the fields of the C struct."""
    table = Path(__file__).parents[1] / "csrc/include/rwkv6_layer_parameters.inc"
    row = r'^RWKV6_LAYER_(?:PARAMETER|MATRIX)\((\w+), "([\w.]+)"'
    rows = re.findall(row, table.read_text(), re.MULTILINE)
    names = [f"{m}.{n}" for m, names in decode._NAMES.items() for n in names]
    assert [name for _, name in rows] == names
    for field, name in rows:
        assert field == name.replace(".", "_") or f"{field}_weight" == name.replace(".", "_")
    block = random_model("6").blocks[1]
    assert sorted(names) == sorted(name for name, _ in block.named_parameters())


@torch.no_grad()
def test_decoding_runs_it() -> None:
    model = random_model("6")
    state, token = model.initial_state(2), torch.tensor([[3], [4]])
    versions = [s._version for s in state]
    with torch.profiler.profile() as profile:
        model.forward_(token, state)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["rwkv6::decode_layer"] == model.n_layer
    assert "rwkv6::wkv_update" not in calls
    assert all(s._version > before for s, before in zip(state, versions, strict=True))


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def replaced(model: RWKV) -> None:
    model.blocks[1].att.key = Doubled(model.blocks[1].att.key)


def hooked(model: RWKV) -> None:
    model.blocks[1].ffn.key.register_forward_hook(lambda module, args, out: 2 * out)


def patched(model: RWKV) -> None:
    plain = model.blocks[1].att.gate.forward
    model.blocks[1].att.gate.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [replaced, hooked, patched])
@torch.no_grad()
def test_changed_modules_are_heard(change: object) -> None:
    model = random_model("6")
    change(model)  # type: ignore[operator]
    token = torch.tensor([[3], [4]])
    plain, state = random_model("6").initial_state(2), model.initial_state(2)
    unchanged = random_model("6").forward_(token, plain)
    expected, new = model(token, state.clone())
    found = model.forward_(token, state)
    torch.testing.assert_close(found, expected[:, -1])
    for a, b in zip(state, new, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(found, unchanged, atol=1e-3)


@torch.no_grad()
def test_what_the_operator_is_not_for() -> None:
    model = random_model("6")
    block = model.blocks[0]
    x, states = layer_of(model, 2)
    assert decode_(block, x.expand(2, 3, -1), *states) is None
    assert decode_(block, x.bfloat16(), *states) is None
    assert decode_(random_model("5.2").blocks[0], x, *states) is None
    many, own = layer_of(model, 9)
    assert decode_(block, many, *own) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert decode_(block, x, *states) is None
    mixed = random_model("6")
    mixed.blocks[0].ln1.double()
    assert decode_(mixed.blocks[0], x, *states) is None
    with torch.enable_grad():
        assert decode_(block, x, *states) is None


@torch.no_grad()
def test_errors_name_the_argument_and_leave_the_states() -> None:
    model = random_model("6")
    block = model.blocks[0]
    x, states = layer_of(model, 2)
    before = RWKVState(*(s.clone() for s in states))
    for name, shape, message in (
        ("att.key.weight", (3, 4), r"att\.key\.weight: expected shape \[32, 32\] .*got \[3, 4\]"),
        ("ln1.bias", (31,), r"ln1\.bias: expected shape \[32\]"),
        ("att.time_maa_w2", (5, 4, 31), r"att\.time_maa_w2: expected shape \[5, 4, 32\]"),
        ("att.time_faaaa", (3, 8), r"att\.time_faaaa: expected \[H, N\] with H \* N = 32"),
    ):
        parameter = model.get_parameter("blocks.0." + name)
        kept, parameter.data = parameter.data, torch.zeros(shape)
        with pytest.raises(RuntimeError, match=message):
            decode_(block, x, *states)
        parameter.data = kept
    with pytest.raises(RuntimeError, match=r"att_shift: .* shares memory with ffn_shift"):
        decode_(block, x, states[0], states[1], states[0])
    with pytest.raises(RuntimeError, match="wkv: expected shape"):
        decode_(block, x, states[0], states[1][:1], states[2])
    with pytest.raises(RuntimeError, match="expected 28 parameters, got 1"):
        torch.ops.rwkv6.decode_layer(x[:, 0], *states, [x], [], 1e-5, 1e-5)
    with pytest.raises(RuntimeError, match="expected 8 scales, got 1"):
        torch.ops.rwkv6.decode_layer(x[:, 0], *states, [x] * 28, [x], 1e-5, 1e-5)
    for a, b in zip(states, before, strict=True):
        assert torch.equal(a, b)
