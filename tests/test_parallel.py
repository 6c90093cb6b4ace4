"""Over several processes the operators give the results and gradients of one.

Sharded tensors (DTensor), and sequences cut into pieces (torch_rwkv6.parallel).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_rwkv6

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
from processes import run_cases
from samples import Call, random_call, relative_rms
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

SECONDS = 120  # for all cases of one launch
CASES: dict[int, dict[str, Callable[[], None]]] = {2: {}, 4: {}}


def case(*sizes: int, **arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Has these numbers of processes run a function."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = " | ".join([function.__name__, *map(str, arguments.values())])
        for size in sizes:
            CASES[size][name] = lambda: function(**arguments)
        return function

    return register


def close(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    limit = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[found.dtype]
    error = relative_rms(found.detach(), expected.detach())
    assert error <= limit, f"{name}: {error}"


# ---- sharded tensors

Kind = dict[str, Placement]
WHOLE: Kind = dict.fromkeys(
    ("tokens", "u", "state", "map", "final", "grad_u", "grad_state"), Replicate()
)
HEADS: Kind = WHOLE | {
    "tokens": Shard(2),
    "u": Shard(0),
    "state": Shard(1),
    "final": Shard(1),
    "grad_u": Shard(0),
    "grad_state": Shard(1),
}
POOL: Kind = WHOLE | {  # batch, where all sequences may begin from all states
    "tokens": Shard(0),
    "map": Shard(0),
    "final": Shard(0),
    "grad_u": Partial(),
    "grad_state": Partial(),
}
BATCH: Kind = POOL | {"state": Shard(0), "grad_state": Shard(0)}
INPUTS = ("tokens", "tokens", "tokens", "tokens", "u", "state", "map", "map")
GRADS = ("tokens", "tokens", "tokens", "tokens", "grad_u", "grad_state")


def dealt(x: Tensor | None, mesh: DeviceMesh, *placements: Placement) -> Tensor | None:
    if x is None:
        return None
    found = distribute_tensor(x, mesh, placements, src_data_rank=None)  # all have the same x
    return found.requires_grad_() if found.is_floating_point() else found


def sharded(call: Call, mesh: DeviceMesh, kinds: tuple[Kind, ...]) -> Call:
    return Call(
        *(
            dealt(x, mesh, *(kind[name] for kind in kinds))
            for name, x in zip(INPUTS, call.args(), strict=True)
        )
    )


def assert_equals_one_process(call: Call, mesh: DeviceMesh, kinds: tuple[Kind, ...]) -> None:
    whole, parts = call.leaves(), sharded(call, mesh, kinds)
    grads = call.grad_outputs()
    expected = torch.ops.rwkv6.wkv(*whole.args())
    torch.autograd.backward(expected, grads)

    found = torch.ops.rwkv6.wkv(*parts.args())
    for x, name in zip(found, ("tokens", "final"), strict=True):
        assert x.placements == tuple(kind[name] for kind in kinds), name
    given = [dealt(g, mesh, *x.placements).detach() for g, x in zip(grads, found, strict=True)]
    found_grads = torch.autograd.grad(found, parts.differentiable(), given)

    names = [n for n, x in zip(GRADS, call.floats(), strict=True) if x is not None]
    placements = [[kind[name] for kind in kinds] for name in names]
    assert [list(g.placements) for g in found_grads] == placements
    pairs = [*zip(found, expected, strict=True)]
    pairs += zip(found_grads, [x.grad for x in whole.differentiable()], strict=True)
    for x, y in pairs:
        if any(p.is_partial() for p in x.placements):
            close(x.full_tensor(), y, "a sum over processes")
        else:
            assert torch.equal(x.full_tensor(), y), x.placements


def calls(B: int, H: int, dtype: torch.dtype) -> dict[str, Call]:
    options: dict[str, dict[str, Any]] = {
        "no state": {},
        "a state each": {"states": B},
        "a shared state": {"states": 1},
        "mapped states": {"states": 3, "state_map": [i % 2 for i in range(B)]},
        "as many mapped states as sequences": {"states": B, "state_map": [0] * B},
        "packed": {"states": 3, "cu_seqlens": [0, 2, 2, 7]},
    }
    return {
        name: random_call(1 if name == "packed" else B, 7, H, 8, dtype, **given)
        for name, given in options.items()
    }


def kinds_of(name: str) -> Kind:
    return BATCH if name in ("no state", "a state each") else POOL


@case(2, 4)
def heads_and_sequences() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, call in calls(5, 6, torch.float64).items():  # the last of 4 gets none of 5 sequences
        assert_equals_one_process(call, mesh, (HEADS,))
        assert_equals_one_process(call, mesh, (WHOLE if name == "packed" else kinds_of(name),))


@case(4)
def two_dimensional_mesh() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for name, call in calls(5, 5, torch.float64).items():
        if name == "packed":
            assert_equals_one_process(call, mesh, (WHOLE, HEADS))
            continue
        batch = kinds_of(name)
        for kinds in ((batch, HEADS), (HEADS, batch)):
            assert_equals_one_process(call, mesh, kinds)
    call, batch = random_call(5, 7, 5, 8, states=5), BATCH
    for kinds in ((HEADS, HEADS), (batch, batch), (WHOLE, batch)):
        assert_equals_one_process(call, mesh, kinds)


@case(2)
def in_float32_and_bfloat16() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for w_dtype in (torch.bfloat16, torch.float32):
        call = random_call(4, 7, 4, 8, torch.bfloat16, w_dtype=w_dtype, states=4)
        for kind in (HEADS, BATCH):
            assert_equals_one_process(call, mesh, (kind,))


@case(2)
def other_placements_are_changed_first() -> None:
    mesh = init_device_mesh("cpu", (2,))
    call = random_call(4, 6, 4, 8, torch.float64)
    parts = sharded(call, mesh, (HEADS,))
    parts.k = dealt(call.k, mesh, Replicate())
    parts.v = dealt(call.v, mesh, Shard(3))
    y, state = torch_rwkv6.wkv(*parts.args()[:5])
    expected_y, expected_state = torch_rwkv6.wkv(*call.args()[:5])
    assert torch.equal(y.full_tensor(), expected_y)
    assert torch.equal(state.full_tensor(), expected_state)
    # A gradient that comes sharded over the tokens is gathered.
    grad_y, _ = call.grad_outputs()
    leaves = call.leaves()
    expected = torch.autograd.grad(torch_rwkv6.wkv(*leaves.args()[:5])[0], leaves.r, grad_y)
    found = torch.autograd.grad(y, parts.r, distribute_tensor(grad_y, mesh, [Shard(1)]))
    close(found[0].full_tensor(), expected[0], "grad_r")


@case(2, 4)
def rwkv4() -> None:
    n = dist.get_world_size()
    mesh = init_device_mesh("cpu", (n,) if n == 2 else (2, 2))
    torch.manual_seed(0)
    k, v = (torch.randn(4, 5, 6, dtype=torch.float64) for _ in range(2))
    w, u = (torch.randn(6, dtype=torch.float64) for _ in range(2))
    _, start = torch_rwkv6.wkv4(k, v, w, u)
    inputs = (k, v, w, u, start)
    grads = torch.randn_like(k), torch.randn_like(start)
    whole = [x.clone().requires_grad_() for x in inputs]
    expected = torch_rwkv6.wkv4(*whole)
    torch.autograd.backward(expected, grads)
    batch = [Shard(0), Shard(0), Replicate(), Replicate(), Shard(0)]
    channels = [Shard(2), Shard(2), Shard(0), Shard(0), Shard(2)]
    for rows in ((batch,), (channels,)) if n == 2 else ((batch, channels), (channels, channels)):
        parts = [dealt(x, mesh, *places) for x, *places in zip(inputs, *rows, strict=True)]
        found = torch_rwkv6.wkv4(*parts)
        assert [x.placements for x in found] == [parts[0].placements, parts[4].placements]
        given = [dealt(g, mesh, *x.placements) for g, x in zip(grads, found, strict=True)]
        torch.autograd.backward(found, [g.detach() for g in given])
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x.full_tensor(), y)
        for x, y in zip(parts, whole, strict=True):
            close(x.grad.full_tensor(), y.grad, "a gradient")


@case(2)
def compiled() -> None:
    """One process is enough: nothing is sent."""
    mesh = init_device_mesh("cpu", (2,))
    call = random_call(4, 6, 4, 8, states=4)

    def function(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        y, state = torch_rwkv6.wkv(*arguments)
        return 2 * y, state

    def results(run: Callable[..., tuple[Tensor, Tensor]], kind: Kind) -> list[Tensor]:
        parts = sharded(call, mesh, (kind,))
        y, state = run(*parts.floats())
        assert y.placements == (kind["tokens"],)
        assert state.placements == (kind["final"],)
        (y.to_local().sum() + state.to_local().square().sum()).backward()
        return [x.to_local() for x in (y, state, *(x.grad for x in parts.differentiable()))]

    for backend in ("inductor", "aot_eager") if dist.get_rank() == 0 else ():
        compiled_function = torch.compile(function, backend=backend, fullgraph=True)
        for kind in (HEADS, BATCH):
            pairs = zip(results(compiled_function, kind), results(function, kind), strict=True)
            for x, y in pairs:
                close(x, y, backend)


@case(2)
def refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    call = random_call(4, 6, 4, 8, states=4)
    parts = sharded(call, mesh, (HEADS,))
    over_tokens = [dealt(x, mesh, Shard(1)) for x in call.floats()[:4]]
    with pytest.raises(RuntimeError, match=r"r: expected every process to have all tokens.*paral"):
        torch_rwkv6.wkv(*over_tokens, parts.u, parts.initial_state)
    with pytest.raises(RuntimeError, match="k: expected every process to have all tokens"):
        torch_rwkv6.wkv(parts.r, over_tokens[1], parts.v, parts.w, parts.u)
    with pytest.raises(ValueError, match="u: expected"):
        torch_rwkv6.wkv(*parts.floats()[:4], dealt(torch.zeros(3, 8), mesh, Replicate()))
    whole = [distribute_tensor(x, mesh, [Replicate()]) for x in call.floats()]
    for kind in (HEADS, BATCH, WHOLE):
        inputs = [x.detach() for x in sharded(call, mesh, (kind,)).floats()]
        before = inputs[5].full_tensor()
        with pytest.raises(RuntimeError, match=r"wkv_update updates its state in place.*to_local"):
            torch_rwkv6.wkv_update(*inputs)
        assert torch.equal(inputs[5].full_tensor(), before)
    k, w = distribute_tensor(torch.zeros(4, 6, 8), mesh, [Shard(0)]), whole[4][0]
    with pytest.raises(RuntimeError, match="wkv4_update updates its state in place"):
        torch_rwkv6.wkv4_update(k, k, w, w, dealt(torch.zeros(4, 3, 8), mesh, Shard(0)).detach())


# ---- the launches


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """By the number of processes and the case."""
    return {
        size: run_cases("test_parallel", size, tmp_path_factory.mktemp(f"of_{size}"), SECONDS)
        for size in CASES
    }


@pytest.mark.parametrize(
    ("size", "name"), [(n, name) for n, cases in CASES.items() for name in cases]
)
def test_over_processes(size: int, name: str, errors: dict[int, dict[str, str]]) -> None:
    assert not errors[size][name], errors[size][name]
