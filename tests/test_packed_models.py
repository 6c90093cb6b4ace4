"""Models over packed sequences: nothing of a sequence reaches another."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import VERSIONS, V, random_model, random_tokens
from torch import Tensor, nn

from torch_rwkv6.nn import RWKV, RWKVState

ENDS = [0, 5, 5, 6, 12]  # one of the sequences has no tokens
# A product of more rows may add in another order, and every layer passes that on to the next.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
FOREIGN = ("", "blocks.1", "blocks.1.att", "blocks.1.ffn")


def packed(dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    return random_tokens(1, ENDS[-1]), torch.tensor(ENDS, dtype=dtype)


def random_state(model: RWKV, rows: int) -> RWKVState:
    with torch.no_grad():
        state: RWKVState = model(random_tokens(rows, 3))[1]
    return state


def one_by_one(model: RWKV, tokens: Tensor, state: RWKVState | None) -> tuple[Tensor, RWKVState]:
    results = []
    for m, (begin, end) in enumerate(itertools.pairwise(ENDS)):
        own = None if state is None else state.select([m])
        results.append(model(tokens[:, begin:end], own))
    logits, states = zip(*results, strict=True)
    return torch.cat(logits, 1), RWKVState.cat(states)


def unchanged(model: RWKV) -> None:
    pass


def foreign_forward(name: str) -> Callable[[RWKV], None]:
    """Somebody's own forward, with the documented arguments alone."""

    def change(model: RWKV) -> None:
        module = model.get_submodule(name)
        plain = module.forward
        module.forward = lambda x, *states: plain(2 * x if x.is_floating_point() else x, *states)

    return change


def hooked(model: RWKV) -> None:
    for module in (model, model.blocks[1], model.blocks[1].ffn):
        module.register_forward_hook(lambda module, args, out: (2 * out[0], *out[1:]))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "change",
    [unchanged, hooked, *(foreign_forward(n) for n in FOREIGN)],
    ids=["unchanged", "hooked", "model", "block", "time mixing", "channel mixing"],
)
def test_packed_sequences_are_those_alone(
    version: str, given: bool, change: Callable[[RWKV], None]
) -> None:
    model = random_model(version)
    state = random_state(model, 4) if given else None
    change(model)
    tokens, cu_seqlens = packed()
    if "forward" not in vars(model):  # which would have to have the argument
        with torch.no_grad():
            expected = one_by_one(model, tokens, state)
            found = model(tokens, state, cu_seqlens=cu_seqlens)
        for x, y in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(x, y, **FLOAT32)

    # in place, where every sequence has a token
    own = random_state(model, 3) if given else model.initial_state(3)
    start, memory = own.clone(), [x.data_ptr() for x in own]
    logits = model.forward_(tokens, own, torch.tensor([0, 5, 6, 12]))
    assert memory == [x.data_ptr() for x in own]
    for m, (begin, end) in enumerate(((0, 5), (5, 6), (6, 12))):
        with torch.no_grad():
            expected_logits, after = model(tokens[:, begin:end], start.select([m]))
        torch.testing.assert_close(logits[m], expected_logits[0, -1], **FLOAT32)
        for x, y in zip(own.select([m]), after, strict=True):
            torch.testing.assert_close(x, y, **FLOAT32)


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_of_packed_sequences(version: str) -> None:
    model = random_model(version, torch.float64)
    tokens, cu_seqlens = packed(torch.int32)
    gradients = []
    for run in (
        lambda state: model(tokens, state, cu_seqlens=cu_seqlens),
        lambda state: one_by_one(model, tokens, state),
    ):
        state = RWKVState(*(x.requires_grad_() for x in random_state(model, 4)))
        logits, new = run(state)
        weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        loss = (logits * weight).sum() + sum((x * x).sum() for x in new)
        gradients.append(torch.autograd.grad(loss, [*model.parameters(), *state]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("version", ["4", "6"])
def test_no_gradient_reaches_another_sequence(version: str) -> None:
    model = random_model(version)
    tokens, cu_seqlens = packed()
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    model.emb.register_forward_hook(keep)
    logits, _ = model(tokens, cu_seqlens=cu_seqlens)
    (gradient,) = torch.autograd.grad(logits[0, 6:].sum(), embedded[0])
    assert not gradient[0, :6].any()
    assert gradient[0, 6:].all()


def test_features_of_packed_sequences() -> None:
    model = random_model("6")
    tokens, cu_seqlens = packed()
    with torch.no_grad():
        logits, _ = model(tokens, cu_seqlens=cu_seqlens)
        features, _ = model.features(tokens, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(model.head(features), logits)


def test_packed_sequences_compile() -> None:
    torch._dynamo.reset()
    model = random_model("6")
    tokens, cu_seqlens = packed()
    with torch.no_grad():
        expected, _ = model(tokens, cu_seqlens=cu_seqlens)
        step = torch.compile(model, backend="eager", fullgraph=True)
        found, _ = step(tokens, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(found, expected)


def test_packed_sequences_that_do_not_fit() -> None:
    model = random_model("6")
    tokens = random_tokens(1, 12)

    def offsets(*values: int) -> Tensor:
        return torch.tensor(values)

    for cu_seqlens, error, message in (
        ([0, 12], TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
        (torch.tensor([0.0, 12.0]), TypeError, "cu_seqlens: expected int64 or int32"),
        (offsets(0), ValueError, r"cu_seqlens: expected \[M \+ 1\]"),
        (torch.tensor([[0, 12]]), ValueError, r"cu_seqlens: expected \[M \+ 1\]"),
        (offsets(0, 12).to("meta"), ValueError, "cu_seqlens: expected the device of tokens"),
        (offsets(1, 12), RuntimeError, "cu_seqlens: the first must be 0"),
        (offsets(0, 11), RuntimeError, "cu_seqlens: the last must be T = 12"),
        (offsets(0, 8, 4, 12), RuntimeError, "cu_seqlens: must not fall"),
    ):
        with pytest.raises(error, match=message):
            model(tokens, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="tokens: packed sequences need B = 1"):
        model(random_tokens(2, 12), cu_seqlens=offsets(0, 12))
    with pytest.raises(ValueError, match=r"state.att_shift: expected .*\(3, 2, 32\), got"):
        model(tokens, model.initial_state(1), cu_seqlens=offsets(0, 4, 12))
    with pytest.raises(ValueError, match="cu_seqlens: expected at least one token in every"):
        model.forward_(tokens, model.initial_state(2), offsets(0, 12, 12))
    with pytest.raises(IndexError):
        model(tokens + V, cu_seqlens=offsets(0, 12))


def test_a_row_of_a_state_shares_its_memory() -> None:
    state = random_model("6").initial_state(3)
    state.row(1).wkv.fill_(2)
    assert state.wkv[:, 1].eq(2).all()
    assert state.wkv[:, [0, 2]].eq(0).all()
    for i in (3, -4):
        with pytest.raises(IndexError):
            state.row(i)
