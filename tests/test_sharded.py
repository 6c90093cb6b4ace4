"""fully_shard (FSDP2) on a model: the same logits and states, carried in float32 whatever is cast.

Two processes over gloo run all cases, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
from checkpoints import random_model, random_tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import torch_rwkv6
from torch_rwkv6.nn import RWKV, RWKVState

PROCESSES = 2
SECONDS = 240  # for the two processes, most of them spent on imports
VERSIONS = ("4", "5.2", "6")
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
POLICIES = {
    "as it is": (MixedPrecisionPolicy(), MixedPrecisionPolicy()),
    "bf16": (BF16, BF16),
    "bf16, the root's inputs not cast": (
        BF16,
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False),
    ),
    "bf16, outputs too": (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16),
    )
    * 2,
}
CASES: dict[int, dict[str, Callable[[], None]]] = {PROCESSES: {}}


def sharded(model: RWKV, policy: str, *, mixes: bool = False) -> RWKV:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    of_blocks, of_root = POLICIES[policy]
    for block in model.blocks:
        if mixes:
            fully_shard(block.att, mesh=mesh, mp_policy=of_blocks)
        fully_shard(block, mesh=mesh, mp_policy=of_blocks)
    fully_shard(model, mesh=mesh, mp_policy=of_root)
    return model


def states_of(model: RWKV, tokens: Tensor, length: int) -> list[RWKVState]:
    """After the first token, and after all, which are read in pieces of the length."""
    with torch.no_grad():
        _, first = model(tokens[:, :1])
        state = first
        for piece in tokens[:, 1:].split(length, 1):
            _, state = model(piece, state)
    return [first, state]


def case(*arguments: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = " | ".join([function.__name__, *map(str, arguments)])
        CASES[PROCESSES][name] = lambda: function(*arguments)
        return function

    return register


def equals_the_whole_model(version: str, policy: str) -> None:
    low = policy != "as it is"
    whole = random_model(version)
    reference = random_model(version, torch.bfloat16) if low else whole
    model = sharded(random_model(version), policy, mixes=version == "6")
    tokens = random_tokens(2, 6)

    start = model.initial_state(2)
    for x, expected in zip(start, whole.initial_state(2), strict=True):
        assert type(x) is Tensor
        assert x.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(x, expected)

    with torch.no_grad():
        expected_logits, _ = reference(tokens)
        logits, state = model(tokens)
    tolerance = {"rtol": 0.05, "atol": 0.1} if low else {}
    torch.testing.assert_close(logits, expected_logits, check_dtype=False, **tolerance)
    assert state.wkv.dtype == torch.float32
    # not a number of bfloat16: nothing rounded it on its way
    assert not torch.equal(state.wkv, state.wkv.bfloat16().float())

    # carried from call to call and updated in place: the same states as in one piece
    carried = states_of(model, tokens, 1)[-1]
    own = start
    with torch.no_grad():
        for piece in tokens.split(1, 1):
            found = model.forward_(piece, own)
    torch.testing.assert_close(found, logits[:, -1], check_dtype=False, **tolerance)
    for other in (carried, own):
        assert other.wkv.dtype == torch.float32
        error = (other.wkv - state.wkv).norm() / state.wkv.norm()
        assert error < (0.02 if low else 1e-5), error
    if low:  # single tokens round alike: what differs between two ways is the carried state alone
        torch.testing.assert_close(own.wkv, carried.wkv, rtol=1e-5, atol=1e-6)
        single = states_of(reference, tokens, 1)[-1]
        error = (own.wkv - single.wkv).norm() / single.wkv.norm()
        assert error < 5e-3, error

    found_tokens = [t.tolist() for t in torch_rwkv6.generate(model, [[1, 2, 3]] * 2, 5, seed=3)]
    if not low:
        expected_tokens = torch_rwkv6.generate(whole, [[1, 2, 3]] * 2, 5, seed=3)
        assert found_tokens == [t.tolist() for t in expected_tokens]


for _version in VERSIONS:
    for _policy in POLICIES:
        case(_version, _policy)(equals_the_whole_model)


@case()
def a_state_that_nothing_changes_keeps_every_bit() -> None:
    """With k = 0 and no decay the state comes back bit for bit."""
    model = random_model("6")
    with torch.no_grad():
        for block in model.blocks:
            block.att.key.weight.zero_()
            block.att.time_decay.fill_(-1e9)  # no decay
            block.att.time_decay_w2.zero_()
    model = sharded(model, "bf16, outputs too", mixes=True)
    state = model.initial_state(2)
    state.wkv.normal_()
    before = state.wkv.clone()
    with torch.no_grad():
        _, after = model(random_tokens(2, 3), state)
        model.forward_(random_tokens(2, 3), state)
    assert torch.equal(after.wkv, before)
    assert torch.equal(state.wkv, before)


@case()
def gradients_through_the_carried_state() -> None:
    whole, tokens = random_model("6"), random_tokens(2, 8)
    model = sharded(random_model("6"), "as it is", mixes=True)

    def gradients(model: RWKV) -> dict[str, Tensor]:
        state, total = None, torch.zeros(())
        for piece in tokens.split([3, 1, 4], 1):
            logits, state = model(piece, state)
            total = total + logits.square().mean()
        total.backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}

    expected = gradients(whole)
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@case()
def gradients_of_the_last_state_alone() -> None:
    whole, tokens = random_model("6"), random_tokens(2, 4)
    model = sharded(random_model("6"), "as it is")
    found = []
    for m in (whole, model):
        _, state = m(tokens)
        state.wkv.square().sum().backward()
        grad = m.blocks[-1].att.key.weight.grad
        found.append(grad.full_tensor() if hasattr(grad, "full_tensor") else grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@case()
def a_trained_state_is_whole() -> None:
    torch.manual_seed(0)
    whole = torch_rwkv6.nn.RWKV6(41, 2, 32, 8, lora_mix=4, lora_decay=6, train_state=True)
    with torch.no_grad():
        for block in whole.blocks:
            block.att.time_state.normal_()
    expected = whole.initial_state(2)
    tokens = random_tokens(2, 3)
    logits = whole(tokens)[0].detach()
    model = sharded(whole, "as it is", mixes=True)
    state = model.initial_state(2)
    for x, y in zip(state, expected, strict=True):
        assert type(x) is Tensor
        assert torch.equal(x, y)
    torch.testing.assert_close(model(tokens, state)[0], logits)
    torch.testing.assert_close(model(tokens)[0], logits)


@case()
def activation_checkpointing_around_the_blocks() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    whole, tokens = random_model("6"), random_tokens(2, 6)
    model = random_model("6")
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    model = sharded(model, "bf16")
    state, total = None, torch.zeros(())
    for piece in tokens.split([3, 3], 1):
        logits, state = model(piece, state)
        total = total + logits.float().square().mean()
    total.backward()
    assert state.wkv.dtype == torch.float32
    assert not torch.equal(state.wkv, state.wkv.bfloat16().float())
    whole(tokens)[0].square().mean().backward()
    found = model.blocks[0]._checkpoint_wrapped_module.att.key.weight.grad.full_tensor()
    expected = whole.blocks[0].att.key.weight.grad
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.95


@case()
def built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = torch_rwkv6.nn.RWKV6(41, 2, 32, 8, lora_mix=4, lora_decay=6)
    model = sharded(model, "bf16")
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())  # the processes need not agree
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    whole = {n: p.full_tensor() for n, p in model.state_dict().items()}
    assert whole["emb.weight"].abs().max() <= 1e-4
    assert not whole["blocks.0.att.output.weight"].any()
    for name, gain in (("att.receptance", 1.0), ("att.key", 0.1)):
        weight = whole[f"blocks.1.{name}.weight"]
        torch.testing.assert_close(weight.T @ weight, gain**2 * torch.eye(32), rtol=0, atol=1e-5)
    decay = torch.tensor([-6 + 5 * (n / 31) ** 2 for n in range(32)])
    torch.testing.assert_close(whole["blocks.1.att.time_decay"].flatten(), decay)
    gathered: list[Any] = [None] * PROCESSES
    dist.all_gather_object(gathered, whole["blocks.1.att.key.weight"])
    assert torch.equal(*gathered)


@pytest.mark.parametrize("name", CASES[PROCESSES])
def test_sharded(name: str, errors: dict[int, dict[str, str]]) -> None:
    assert not errors[PROCESSES][name], errors[PROCESSES][name]
