"""parallelize: a model spread over the processes of a mesh computes and learns what one does.

Four processes over gloo run all cases, one after the other.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints import D, N, V, random_model, random_tokens
from samples import relative_rms
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import distribute_tensor
from torch.nn.functional import cross_entropy

import torch_rwkv6
import torch_rwkv6.parallel.heads  # before the processes are forked
from torch_rwkv6 import parallel
from torch_rwkv6.nn import RWKV, RWKV4, RWKV6, RWKVState, quantize_int8_

SECONDS = 240  # for all cases of one launch
PROCESSES = 4
CASES: dict[int, dict[str, Callable[[], None]]] = {PROCESSES: {}}
Sizes = dict[str, int]


def case(*arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        words = (getattr(x, "__name__", str(x)) for x in arguments)
        name = " | ".join([function.__name__, *words])
        CASES[PROCESSES][name] = lambda: function(*arguments)
        return function

    return register


def mesh_of(sizes: Sizes) -> DeviceMesh:
    """Of all processes, or one for each pair of them."""
    names = tuple(sizes)
    if math.prod(sizes.values()) == PROCESSES:
        return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=names)
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", *names))[names]


def close(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    error = relative_rms(found.detach(), expected.detach())
    assert error <= {torch.float64: 1e-10, torch.float32: 1e-5}[found.dtype], f"{name}: {error}"


def close_shards(found: Any, expected: Tensor, name: str) -> None:
    """What this process has of a DTensor."""
    mesh, placements = found.device_mesh, found.placements
    own = distribute_tensor(expected.detach(), mesh, placements, src_data_rank=None).to_local()
    assert found.to_local().shape == own.shape
    if own.numel():
        close(found.to_local(), own, name)


class Share:
    """What this process of a mesh has of tokens and states."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.at = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp"), (0, 1))
        for name in mesh.mesh_dim_names:
            self.at[name] = mesh.get_local_rank(name), mesh[name].size()

    def size(self, *names: str) -> int:
        return math.prod(self.at[name][1] for name in names)

    def _cut(self, x: Tensor, name: str, dim: int) -> Tensor:
        rank, size = self.at[name]
        return x.chunk(size, dim)[rank]

    def rows(self, x: Tensor, dim: int = 0) -> Tensor:
        return self._cut(self._cut(x, "dp_replicate", dim), "dp_shard", dim)

    def tokens(self, x: Tensor) -> Tensor:  # [B, T, ...]
        return self._cut(self.rows(x), "cp", 1)

    def heads(self, state: RWKVState) -> RWKVState:
        return state._replace(wkv=self._cut(state.wkv, "tp", 2))

    def state(self, state: RWKVState) -> RWKVState:
        return self.heads(RWKVState(*(self.rows(x, 1) for x in state)))


def small(n_layer: int = 1, **options: Any) -> RWKV6:
    return RWKV6(V, n_layer, D, N, lora_mix=4, lora_decay=6, train_state=True, **options)


def tuned_model(version: str, dtype: torch.dtype) -> RWKV:
    """A random model, of RWKV-6 with states to tune."""
    n_layer = 2 if dtype == torch.float64 else 1
    model = random_model(version, n_layer=n_layer)
    if version == "6":
        states = {f"blocks.{i}.att.time_state": torch.randn(D // N, N, N) for i in range(n_layer)}
        weights = model.state_dict() | states
        model = small(n_layer)
        model.load_state_dict(weights)
    return model.to(dtype)


class Run:
    """Three optimiser steps of a model over pieces of all sequences, and the state carried on."""

    def __init__(self, model: RWKV, share: Share, *, cut: bool) -> None:
        # As much for each process whatever the mesh: torch plans for every shape once.
        rows, length = 2 * share.size("dp_replicate", "dp_shard"), 3 * share.size("cp")
        data = random_tokens(rows, 4 * length + 1)
        self.logits: list[Tensor] = []  # of all pieces
        self.grads: dict[str, Tensor] = {}  # of the first step, through the state as well
        # In float32, AdamW would make much of the rounding of gradients that are nearly zero.
        double = next(model.parameters()).dtype == torch.float64
        kind = partial(torch.optim.AdamW, betas=(0.9, 0.99)) if double else torch.optim.SGD
        optimizer = kind(model.parameter_groups(lr=0.1, weight_decay=0.1))
        state = None
        for pieces in ([0, 1], [2], [3]):
            losses = []
            for i in pieces:
                tokens, targets = (data[:, i * length + j :][:, :length] for j in (0, 1))
                if cut:
                    tokens, targets = share.tokens(tokens), share.tokens(targets)
                logits, state = model(tokens, state)
                self.logits.append(logits.detach())
                losses.append(cross_entropy(logits.flatten(0, 1), targets.flatten()))
            sum(losses).backward()
            optimizer.step()
            state = RWKVState(*state).detach()
            if not self.grads:
                self.grads = {n: p.grad for n, p in model.named_parameters()}
            optimizer.zero_grad()
        self.state = state
        self.model, self.parameters = model, dict(model.named_parameters())


def learns_what_one_process_does(version: str, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    share = Share(mesh)
    expected = Run(tuned_model(version, dtype), share, cut=False)
    model = tuned_model(version, dtype)
    assert parallel.parallelize(model, mesh) is model
    model.gradient_checkpointing = dtype == torch.float32
    found = Run(model, share, cut=True)
    for x, y in zip(found.logits, expected.logits, strict=True):
        close(x, share.tokens(y), "logits")
    for name, x, y in zip(RWKVState._fields, found.state, share.state(expected.state)):
        assert type(x) is Tensor
        close(x, y, name)
    for name, y in expected.grads.items():
        close_shards(found.grads[name], y, f"the gradient of {name}")
        close_shards(found.parameters[name], expected.parameters[name], name)
    if "cp" in mesh.mesh_dim_names:
        packs_what_one_process_does(found.model, expected.model, share)


def packs_what_one_process_does(model: RWKV, whole: RWKV, share: Share) -> None:
    """Packed sequences over the processes' borders: logits, states and gradients."""
    batches = share.size("dp_replicate", "dp_shard")  # of packed sequences, one a row
    length = 6 * share.size("cp")
    data = random_tokens(batches, length + 1)
    cu_seqlens = torch.tensor([0, 1, 1, 4, length - 1, length])
    sequences = cu_seqlens.numel() - 1
    torch.manual_seed(1)
    zeros = whole.initial_state(batches * sequences)
    start_of_all = RWKVState(*(torch.randn_like(x).requires_grad_() for x in zeros))

    def rows(state: RWKVState, row: int) -> RWKVState:
        return RWKVState(*(x[:, row * sequences :][:, :sequences] for x in state))

    def loss_of(logits: Tensor, targets: Tensor, state: RWKVState) -> Tensor:
        return cross_entropy(logits[0], targets[0]) + sum(x.square().sum() for x in state) / 100

    expected = []
    for row in range(batches):
        tokens, targets = data[row : row + 1, :-1], data[row : row + 1, 1:]
        logits, state = whole(tokens, rows(start_of_all, row), cu_seqlens=cu_seqlens)
        (loss_of(logits, targets, state) / batches).backward()
        expected.append((logits, state))

    row = share.rows(torch.arange(batches)).item()
    start = share.heads(rows(start_of_all, row)).clone()
    start = RWKVState(*(x.detach().requires_grad_() for x in start))
    tokens, targets = share.tokens(data[:, :-1]), share.tokens(data[:, 1:])
    logits, state = model(tokens, start, cu_seqlens=cu_seqlens)
    close(logits, share.tokens(torch.cat([x for x, _ in expected])), "logits")
    for name, x, y in zip(RWKVState._fields, state, share.heads(expected[row][1])):
        close(x, y, name)
    loss_of(logits, targets, RWKVState(*state)).backward()
    for (name, x), y in zip(model.named_parameters(), whole.parameters(), strict=True):
        if y.grad is not None:
            close_shards(x.grad, y.grad, f"the gradient of {name}")
    # Of the first process alone; and of a sum of losses, where it is a mean for parameters.
    grads = RWKVState(*(x.grad for x in start_of_all))
    for name, x, y in zip(RWKVState._fields, start, share.heads(rows(grads, row))):
        share_of = batches * share.size("cp") if share.at["cp"][0] == 0 else 0
        close(x.grad, share_of * y, f"the gradient of the initial {name}")


@case("6", torch.float64, {"tp": 2}, "6", {"dp_shard": 2})
@case("6", torch.float32, {"tp": 2}, "6", {"dp_shard": 2})
@case("5.1", torch.float64, {"tp": 2}, "6", {"cp": 2})
def two_pairs(version: str, dtype: torch.dtype, a: Sizes, other: str, b: Sizes) -> None:
    """One pair of processes does one thing, the other pair the other."""
    meshes = [mesh_of(sizes) for sizes in (a, b)]  # by all processes
    pair = dist.get_rank() // 2
    learns_what_one_process_does((version, other)[pair], dtype, meshes[pair])


@case("6", torch.float64, {"dp_shard": 2, "tp": 2})
@case("6", torch.float32, {"dp_shard": 2, "tp": 2})
@case("6", torch.float64, {"dp_shard": 2, "cp": 2})
@case("6", torch.float32, {"dp_shard": 2, "cp": 2})
@case("6", torch.float64, {"cp": 2, "tp": 2})
@case("6", torch.float64, {"dp_replicate": 2, "dp_shard": 1, "cp": 2})
def all_together(version: str, dtype: torch.dtype, sizes: Sizes) -> None:
    learns_what_one_process_does(version, dtype, mesh_of(sizes))


def at_once(model: RWKV) -> None:
    model.reset_parameters()


def from_the_last(model: RWKV) -> None:
    for module in reversed(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@case({"dp_shard": 2, "tp": 2}, at_once)
@case({"dp_shard": 4}, from_the_last)
def the_same_initial_values_whatever_the_mesh(sizes: Sizes, reset: Callable[[RWKV], None]) -> None:
    expected = small()
    torch.manual_seed(7)
    reset(expected)
    with torch.device("meta"):
        model = small()
    parallel.parallelize(model, mesh_of(sizes))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(7 + dist.get_rank())  # the seed of the first process counts
    reset(model)
    for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(x.full_tensor(), y), name


@case()
def states_are_plain_and_generation_goes_on() -> None:
    mesh = mesh_of({"dp_shard": 2, "tp": 2})
    share, whole = Share(mesh), tuned_model("6", torch.float32)
    tokens = random_tokens(2, 3)
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        model = parallel.parallelize(tuned_model("6", torch.float32), mesh, mp_policy=policy)
        state = model.initial_state(2)
        expected = whole.initial_state(2)
        for x, y, z in zip(state, expected, share.heads(expected), strict=True):
            assert type(x) is Tensor
            assert torch.equal(x, z)
            assert x.dtype == y.dtype
        with torch.no_grad():
            logits, after = model(tokens, state)
            model.forward_(tokens, state)
        assert after.wkv.dtype == torch.float32
        assert not torch.equal(after.wkv, after.wkv.bfloat16().float())  # nothing rounded it
        torch.testing.assert_close(state.wkv, after.wkv, rtol=1e-5, atol=1e-6)
        if policy.param_dtype is None:
            close(logits, whole(tokens)[0], "logits")
            expected = torch_rwkv6.generate(whole, tokens.tolist(), 4, seed=3)
            found = torch_rwkv6.generate(model, tokens.tolist(), 4, seed=3)
            assert [t.tolist() for t in found] == [t.tolist() for t in expected]


def trained(model: RWKV) -> torch.optim.Optimizer:
    """What trains the model, after one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    return optimizer


def momenta(model: RWKV, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}


def checkpoint_of(model: RWKV, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


@case()
def a_checkpoint_is_read_by_any_number_of_processes() -> None:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    model = parallel.parallelize(tuned_model("6", torch.float32), mesh_of({"dp_shard": 2, "tp": 2}))
    optimizer = trained(model)
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder[0])
    weights = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    moments = {n: x.full_tensor() for n, x in momenta(model, optimizer).items()}

    # by two: the first pair by one form, the second by another one
    mesh = [mesh_of(sizes) for sizes in ({"dp_shard": 2}, {"tp": 2})][dist.get_rank() // 2]
    model = parallel.parallelize(small(), mesh)
    optimizer = trained(model)
    content = checkpoint_of(model, optimizer)
    dcp.load(content, checkpoint_id=folder[0], process_group=mesh.get_group())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
    )
    moved = momenta(model, optimizer)
    for name, x in model.named_parameters():
        close_shards(x, weights[name], name)
        close_shards(moved[name], moments[name], f"the momentum of {name}")

    # by one, and as a file for `models.load`
    if dist.get_rank() == 0:
        model = small()
        dcp.load({"model": model.state_dict()}, checkpoint_id=folder[0], no_dist=True)
        file = Path(folder[0], "model.pth")
        dcp_to_torch_save(folder[0], file)
        loads = (torch_rwkv6.models.load(x, train_state=True) for x in (file, folder[0]))
        for again in (model, *loads):
            assert all(torch.equal(x, weights[n]) for n, x in again.named_parameters())
        found = torch_rwkv6.models.read(folder[0])["optimizer"]["state"]
        for name, x in moments.items():
            assert torch.equal(found[name]["momentum_buffer"], x), name
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


@case()
def a_compiled_block_is_given_a_plain_tensor() -> None:
    """And none of torch's that waits for the other processes, for which compiled code fails."""
    model = parallel.parallelize(small(), mesh_of({"tp": 2}))
    assert type(model.emb(random_tokens(2, 3))) is Tensor


@case()
def refused() -> None:
    def raises(error: type[Exception], match: str, model: Any, mesh: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            parallel.parallelize(model, mesh, **options)

    tp, cp = mesh_of({"tp": 2}), mesh_of({"cp": 2})
    known = "dp_replicate, dp_shard, cp, tp"
    raises(TypeError, "model: expected an RWKV, got Linear", torch.nn.Linear(2, 2), tp)
    raises(
        TypeError, "mesh: expected a torch.*DeviceMesh, got ProcessGroup", small(), tp.get_group()
    )
    raises(ValueError, f"mesh: .*some of {known}, got 'pp'", small(), mesh_of({"pp": 2}))
    unnamed = init_device_mesh("cpu", (4,))
    raises(ValueError, f"mesh: .*{known} .*got 1 without names", small(), unnamed)
    copies = mesh_of({"dp_replicate": 4})
    raises(ValueError, "mesh: expected dp_shard or cp beside dp_replicate", small(), copies)
    three = RWKV6(V, 1, 24, 8)
    raises(ValueError, "mesh: tp = 2 processes do not share 3 heads", three, tp)
    raises(ValueError, "mesh: tp = 2 processes do not share 33 n_ffn", small(n_ffn=33), tp)
    tied = small()
    tied.head.weight = tied.emb.weight
    raises(ValueError, "model: .*tp, got one parameter that is both", tied, tp)
    int8 = quantize_int8_(small())
    raises(TypeError, r"model: expected torch.nn.Linear .*Int8Linear as head", int8, tp)
    for model in (tied, int8):  # nothing was changed
        assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    raises(ValueError, "reshard_after_forward: .*tp", small(), tp, reshard_after_forward=True)
    for mesh in (tp, cp):
        raises(TypeError, "model: expected an RWKV6 or RWKV5 .*RWKV-4", RWKV4(V, 1, D), mesh)
    model = parallel.parallelize(small(), cp)
    raises(ValueError, "model: .*sharded already", model, cp)
    with pytest.raises(IndexError):
        parallel.parallelize(small(), tp)(torch.full((1, 2), V))  # no token
    tokens = random_tokens(1, 3)
    with pytest.raises(RuntimeError, match=r"forward_ and generate .*cp.*model\(tokens, state\)"):
        model.forward_(tokens, model.initial_state(1))
    with pytest.raises(RuntimeError, match=r"cu_seqlens: the last must be T = 6, got 3"):
        model(tokens, cu_seqlens=torch.tensor([0, 1, 3]))
    with pytest.raises(TypeError, match=r"cu_seqlens: expected a torch\.Tensor, got list"):
        model(tokens, cu_seqlens=[0, 6])


# ---- the launch


@pytest.mark.parametrize("name", CASES[PROCESSES])
def test_over_processes(name: str, errors: dict[int, dict[str, str]]) -> None:
    assert not errors[PROCESSES][name], errors[PROCESSES][name]
