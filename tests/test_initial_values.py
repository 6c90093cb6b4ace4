"""Every module's reset_parameters gives the official initial values, in any order."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from checkpoints import VERSIONS, D, N, V
from torch import nn

from torch_rwkv6.nn import RWKV, RWKV4, RWKV5, RWKV6


def assert_official(model: RWKV, atol: float = 2e-6) -> None:
    """What is the same in every version, and does not depend on chance."""
    weights = {n: p.detach().float() for n, p in model.named_parameters()}
    emb = weights["emb.weight"]
    assert 0 < emb.abs().max() <= 1.01e-4
    assert emb.std() == pytest.approx(1e-4 / 3**0.5, rel=0.1)  # 5.8e-5
    gain = 0.5 * max(1.0, (model.vocab_size / D) ** 0.5)
    head = weights["head.weight"]
    torch.testing.assert_close(head.T @ head, gain**2 * torch.eye(D), rtol=0, atol=atol * 50)
    for name, x in weights.items():
        if ".ln_x." not in name and name.endswith(("ln0.weight", "ln1.weight", "ln_out.weight")):
            assert torch.equal(x, torch.ones(D)), name
        if name.endswith(".bias"):
            assert not x.any(), name
    for i, block in enumerate(model.blocks):
        of = {n: p.detach().float() for n, p in block.named_parameters()}
        zero = ["att.output.weight", "ffn.value.weight", "ffn.receptance.weight"]
        orthogonal = {"att.value.weight": 1.0}
        if model.version == "4":
            zero += ["att.key.weight", "att.receptance.weight"]
        else:
            orthogonal |= {"att.receptance.weight": 1.0, "att.key.weight": 0.1}
            expected = torch.full((D,), ((1 + i) / model.n_layer) ** 0.7)
            torch.testing.assert_close(of["att.ln_x.weight"], expected, rtol=0, atol=atol * 10)
        for name in zero:
            assert not of[name].any(), name
        for name, gain in orthogonal.items():
            product = of[name].T @ of[name]
            torch.testing.assert_close(product, gain**2 * torch.eye(D), rtol=0, atol=atol * 50)


def spoiled(model: RWKV) -> RWKV:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    return model


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def parents_first(model: RWKV) -> None:
    for module in model.modules():
        reset(module)


def children_first(model: RWKV) -> None:
    model.apply(reset)


def leaves_only(model: RWKV) -> None:
    """The mixes for their own parameters, then each plain layer once more."""
    for block in model.blocks:
        block.att.reset_parameters()
        block.ffn.reset_parameters()
    for module in model.modules():
        if not list(module.children()):
            reset(module)


def at_once(model: RWKV) -> None:
    model.reset_parameters()


def shuffled(model: RWKV) -> None:
    modules = list(model.modules())
    for i in torch.randperm(len(modules), generator=torch.Generator().manual_seed(3)):
        reset(modules[i])


ORDERS = [parents_first, children_first, leaves_only, at_once, shuffled]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_any_order_of_resets(version: str, order: Callable[[RWKV], None]) -> None:
    model = VERSIONS[version]()
    assert_official(model)
    fresh = {n: p.clone() for n, p in model.named_parameters()}
    order(spoiled(model))
    assert_official(model)
    for name, p in model.named_parameters():
        if "time_" in name and not name.endswith("_w2"):  # no chance in them
            assert torch.equal(p, fresh[name]), name
        assert p.isfinite().all(), name


@pytest.mark.parametrize("order", ORDERS)
def test_from_the_meta_device(order: Callable[[RWKV], None]) -> None:
    for version in VERSIONS:
        with torch.device("meta"):
            model = VERSIONS[version]()
        model.reset_parameters()  # nothing to do yet
        assert all(p.is_meta for p in model.parameters())
        model.to_empty(device="cpu")
        order(spoiled(model))
        assert_official(model)


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "default_dtype", [torch.bfloat16, torch.float16, torch.float64], indirect=True, ids=str
)
@pytest.mark.parametrize("version", VERSIONS)
def test_default_dtypes(version: str, default_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = VERSIONS[version]()
    assert {p.dtype for p in model.parameters()} == {default_dtype}
    torch.set_default_dtype(torch.float32)
    assert_official(model, 1e-6 if default_dtype == torch.float64 else 5e-4)
    reference = VERSIONS[version]()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if "time_" in name and not name.endswith("_w2"):  # rounded once, from the exact values
            torch.testing.assert_close(p, q.to(p.dtype), rtol=1e-7, atol=1e-7, msg=name)
    state = model.initial_state(1)
    with torch.no_grad():
        logits = model.forward_(torch.tensor([[1, 2]]), state)
    assert logits.dtype == state.att_shift.dtype == default_dtype
    assert state.wkv.dtype == torch.promote_types(default_dtype, torch.float32)


def test_converted_models_reset_in_their_own_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = VERSIONS["6"]().to(dtype)
        parents_first(spoiled(model))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert_official(model, 5e-4)


def test_copies_reset_themselves_and_nothing_else() -> None:
    model = VERSIONS["6"]()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        before = {n: p.clone() for n, p in model.named_parameters()}
        children_first(spoiled(again))
        assert_official(again)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    block = copy.deepcopy(model.blocks[1].att.receptance)
    nn.init.zeros_(block.weight)
    block.reset_parameters()
    torch.testing.assert_close(block.weight @ block.weight.T, torch.eye(D), rtol=0, atol=1e-5)


def test_a_deleted_model_is_gone_at_once() -> None:
    model = VERSIONS["6"]()
    layer = weakref.ref(model.blocks[0].att.key)
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_trained_state_starts_at_zero() -> None:
    for model in (
        RWKV6(V, 2, D, N, lora_mix=4, lora_decay=6, train_state=True),
        RWKV5(V, 2, D, N, train_state=True),
    ):
        children_first(spoiled(model))
        assert all(not block.att.time_state.any() for block in model.blocks)


def test_weights_are_plain_layers_of_torch() -> None:
    for model in (VERSIONS["6"](), VERSIONS["5.2"](), RWKV4(V, 1, D)):
        kinds = {type(m) for m in model.modules() if type(m).__module__.startswith("torch.")}
        assert kinds <= {nn.ModuleList, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Embedding}
