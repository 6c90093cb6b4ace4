"""Over several processes the operators give the results and gradients of one.

Sharded tensors (DTensor), and sequences cut into pieces (torch_rwkv6.parallel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_rwkv6

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
from samples import Call, random_call, relative_rms
from test_docs import blocks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rwkv6 import parallel
from torch_rwkv6.nn.token_shift import token_shift

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
    # All have the same x, and none sends it.
    found = distribute_tensor(x.clone(), mesh, placements, src_data_rank=None)
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


def kind_of(name: str) -> Kind:
    """How the sequences of one of `calls` may be sharded."""
    return {"no state": BATCH, "a state each": BATCH, "packed": WHOLE}.get(name, POOL)


@case(2, 4)
def heads_and_sequences() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, call in calls(5, 6, torch.float64).items():  # the last of 4 gets none of 5 sequences
        assert_equals_one_process(call, mesh, (HEADS,))
        assert_equals_one_process(call, mesh, (kind_of(name),))


@case(4)
def two_dimensional_mesh() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for name, call in calls(5, 5, torch.float64).items():
        assert_equals_one_process(call, mesh, (kind_of(name), HEADS))
    call = random_call(5, 7, 5, 8, states=5)
    for kinds in ((HEADS, BATCH), (HEADS, HEADS), (BATCH, BATCH), (WHOLE, BATCH)):
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

    for backend, kind in {"inductor": HEADS, "aot_eager": BATCH}.items():
        if dist.get_rank() == 0:
            compiled_function = torch.compile(function, backend=backend, fullgraph=True)
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


# ---- sequences in pieces


def piece(x: Tensor | None, lengths: list[int], rank: int, dim: int = 1) -> Tensor | None:
    return None if x is None else x.split(lengths, dim)[rank]


def assert_pieces_are_one_sequence(
    call: Call, lengths: list[int], group: dist.ProcessGroup | None
) -> None:
    own = dist.get_rank(group)
    whole = call.leaves()
    torch.manual_seed(0)  # the same gradients on all ranks
    grad_y, grad_state = call.grad_outputs()
    expected_y, expected_state = torch_rwkv6.wkv(*whole.floats(), cu_seqlens=call.cu_seqlens)
    # A different gradient on every rank: the rank's share is one plus its number.
    shares = sum(1 + rank for rank in range(len(lengths)))
    torch.autograd.backward((expected_y, expected_state), (grad_y, shares * grad_state))

    tokens = [piece(x, lengths, own).clone().requires_grad_() for x in call.floats()[:4]]
    rest = [None if x is None else x.clone().requires_grad_() for x in call.floats()[4:]]
    y, state = parallel.wkv(*tokens, *rest, group=group, cu_seqlens=call.cu_seqlens)
    close(y, piece(expected_y, lengths, own), "y")
    close(state, expected_state, "final_state")
    torch.autograd.backward((y, state), (piece(grad_y, lengths, own), (1 + own) * grad_state))
    for name, x, expected in zip("rkvw", tokens, whole.floats(), strict=False):
        close(x.grad, piece(expected.grad, lengths, own), f"grad_{name}")
    u, start = rest
    grad_u = u.grad.clone()
    dist.all_reduce(grad_u, group=group)
    close(grad_u, whole.u.grad, "grad_u")
    if start is not None:
        if own == 0:
            close(start.grad, whole.initial_state.grad, "grad_initial_state")
        else:
            assert not start.grad.any()


LENGTHS = {
    2: [[3, 9], [12, 0], [0, 12]],
    3: [[5, 1, 6]],
    4: [[1, 5, 0, 6], [0, 0, 12, 0], [3, 3, 3, 3]],
}


def calls_to_cut(dtype: torch.dtype) -> Iterator[Call]:
    sizes = {"T": 12, "H": 2, "N": 8, "dtype": dtype}
    plain = random_call(2, **sizes, extreme=True)
    plain.w[0, 2, 0, :3] = torch.tensor([torch.inf, -torch.inf, -1e9])
    yield plain
    yield random_call(3, **sizes, states=3)
    yield random_call(2, **sizes, states=1, w_dtype=torch.float32)
    packed = {"B": 1, **sizes, "cu_seqlens": [0, 1, 1, 9, 12]}
    yield random_call(**packed)
    yield random_call(**packed, states=4, index_dtype=torch.int32)
    yield random_call(**packed, states=1)
    yield random_call(0, **sizes)


@case(2, 4)
def pieces_are_one_sequence() -> None:
    first, *others = LENGTHS[dist.get_world_size()]
    for call in calls_to_cut(torch.float32):
        assert_pieces_are_one_sequence(call, first, None)
    for call in calls_to_cut(torch.float64):
        for lengths in (first, *others):
            assert_pieces_are_one_sequence(call, lengths, None)


@case(4)
def pieces_in_a_smaller_group() -> None:
    for ranks in ([0, 1, 2], [1, 2, 3]):
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            for call in calls_to_cut(torch.float64):
                assert_pieces_are_one_sequence(call, LENGTHS[3][0], group)
        else:
            with pytest.raises(ValueError, match="group: this process is not in it"):
                parallel.wkv(*call_of_a_rank(), group=group)


def call_of_a_rank() -> list[Tensor]:
    call = random_call(2, 3, 2, 8)
    return [call.r, call.k, call.v, call.w, call.u]


@case(2)
def a_group_of_one() -> None:
    groups = [dist.new_group([rank]) for rank in range(2)]
    for call in calls_to_cut(torch.float64):
        assert_pieces_are_one_sequence(call, [12], groups[dist.get_rank()])


@case(2)
def in_low_precision() -> None:
    call = random_call(2, 12, 2, 8, torch.bfloat16, states=2, state_dtype=torch.bfloat16)
    assert_pieces_are_one_sequence(call, [5, 7], None)
    # Autocast casts as it does for the operator.
    call, own = random_call(2, 12, 2, 8, states=2), dist.get_rank()
    with torch.autocast("cpu", torch.bfloat16):
        expected_y, expected_state = torch_rwkv6.wkv(*call.floats())
        leaves = call.map(lambda x: x.clone()).leaves()
        tokens = [piece(x, [5, 7], own) for x in leaves.floats()[:4]]
        y, state = parallel.wkv(*tokens, leaves.u, leaves.initial_state, group=None)
    assert y.dtype == torch.bfloat16
    close(y, piece(expected_y, [5, 7], own), "y")
    assert relative_rms(state.detach(), expected_state) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        (y.float().sum() + state.sum()).backward()
    assert {x.grad.dtype for x in leaves.differentiable()} == {torch.float32}


Model = Callable[..., tuple[Tensor, Tensor]]


def three_steps(call: Call, model: Model, average: Callable[[Tensor], object]) -> list[Tensor]:
    """What three steps of AdamW make of the inputs of a call, by the loss of all ranks."""
    inputs = call.differentiable()
    optimizer = torch.optim.AdamW(inputs, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        y, state = model(*inputs)
        (y.square().sum() + state.sum()).backward()
        average(call.u.grad)
        optimizer.step()
    return [x.detach() for x in inputs]


@case(2, 4)
def three_optimiser_steps() -> None:
    n = dist.get_world_size()
    call = random_call(4, 12, 4, 8, torch.float64, states=4)
    expected = three_steps(call.leaves(), torch_rwkv6.wkv, lambda grad: None)
    mesh = init_device_mesh("cpu", (2,) if n == 2 else (2, 2))
    for kinds in ((HEADS,), (BATCH,)) if n == 2 else ((BATCH, HEADS),):
        parts = sharded(call, mesh, kinds)
        found = three_steps(parts, torch_rwkv6.wkv, lambda grad: None)
        for x, y in zip(found, expected, strict=True):
            close(x.full_tensor(), y, str(kinds))

    def cut(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, state = parallel.wkv(*inputs, group=None)
        return y, state / n  # which all ranks have

    lengths, own = LENGTHS[n][0], dist.get_rank()
    floats = [x if i > 3 else piece(x, lengths, own) for i, x in enumerate(call.floats())]
    found = three_steps(call.with_floats(floats).leaves(), cut, dist.all_reduce)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if i <= 4 or own == 0:  # the state is the first rank's
            close(x, piece(y, lengths, own) if i <= 3 else y, f"input {i}")


class Sent(TorchDispatchMode):
    """The bytes that this process gives to each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.bytes.append(sum(x.numel() * x.element_size() for x in args[1]))
        return function(*args, **(kwargs or {}))


@case(4)
def what_is_sent() -> None:
    B, T, H, N = 2, 64, 3, 16
    call = random_call(B, T, H, N, torch.bfloat16).leaves()
    tokens = call.floats()[:4]
    state, decay, marks = 4 * B * H * N * N, 4 * B * H * N, 8
    with Sent() as forward:
        y, final = parallel.wkv(*tokens, call.u, group=None)
    with Sent() as backward:
        (y.float().sum() + final.sum()).backward()
    assert forward.bytes == [state + decay + marks]
    assert backward.bytes == [2 * state]
    x = torch.randn(B, T, 48, requires_grad=True)
    with Sent() as forward:
        xx, last = parallel.token_shift(x, None, None)
    with Sent() as backward:
        (xx.sum() + last.sum()).backward()
    assert forward.bytes == [4 * B * 48 + 12]
    assert backward.bytes == [2 * 4 * B * 48]


def assert_shifts_as_one(lengths: list[int], ends: list[int] | None, *, given: bool) -> None:
    own = dist.get_rank()
    cu_seqlens = None if ends is None else torch.tensor(ends)
    batch, rows = (2, 2) if ends is None else (1, len(ends) - 1)
    g = torch.Generator().manual_seed(0)
    x, grad, shift, grad_last = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((batch, sum(lengths), 3),) * 2 + ((rows, 3),) * 2
    )
    shift = shift.requires_grad_() if given else None
    x.requires_grad_()
    expected = token_shift(x, shift, cu_seqlens)
    torch.autograd.backward(expected, (grad, len(lengths) * grad_last))

    part = piece(x.detach(), lengths, own).clone().requires_grad_()
    before = None if shift is None else shift.detach().clone().requires_grad_()
    found = parallel.token_shift(part, before, None, cu_seqlens)
    assert torch.equal(found[0], piece(expected[0], lengths, own))
    assert torch.equal(found[1], expected[1])
    torch.autograd.backward(found, (piece(grad, lengths, own), grad_last))
    close(part.grad, piece(x.grad, lengths, own), "grad_x")
    if before is not None:
        close(before.grad, shift.grad if own == 0 else torch.zeros_like(before), "grad_shift")


@case(2, 4)
def token_shift_of_pieces() -> None:
    n = dist.get_world_size()
    for lengths in (*LENGTHS[n], [0] * n):
        T = sum(lengths)
        # sequences over the borders of pieces, of one token, and of none at either end
        for ends in (None, [0, 0, T // 12, T // 12, 3 * T // 4, T, T]):
            assert_shifts_as_one(lengths, ends, given=True)
            assert_shifts_as_one(lengths, ends, given=False)
    x = torch.full((1, 1, 2), torch.inf if dist.get_rank() == 0 else 1.0)
    for cu_seqlens in (None, torch.tensor([0, n])):
        _, last = parallel.token_shift(x, None, None, cu_seqlens)
        assert torch.equal(last, torch.ones(1, 2))  # infinity stays with its neighbour


@case(2)
def examples_of_the_page() -> None:
    scope: dict[str, Any] = {}
    for code in blocks("docs/parallel.md"):
        exec(code, scope)


@case(2)
def refused_pieces() -> None:
    own, arguments = dist.get_rank(), call_of_a_rank()
    state = torch.zeros(2, 2, 8, 8)
    with pytest.raises(ValueError, match=r"initial_state: expected on the first.*rank 1 and not"):
        parallel.wkv(*arguments, state if own == 1 else None, group=None)
    x, shift = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"shift: expected on the first.*rank 1 and not"):
        parallel.token_shift(x, shift if own == 1 else None, None)
    with pytest.raises(ValueError, match="initial_state: autograd records this call on rank 0"):
        parallel.wkv(*arguments, state.requires_grad_() if own == 0 else None, group=None)
    with torch.no_grad():  # where nothing waits for the others
        parallel.wkv(*arguments, state.requires_grad_() if own == 0 else None, group=None)
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match=r"group: expected .*ProcessGroup \(mesh.get_group\(\)"):
        parallel.wkv(*arguments, group=mesh)
    of_tensor = distribute_tensor(torch.zeros(2, 6, 2, 8), mesh, [Shard(1)])
    with pytest.raises(TypeError, match=r"k: expected this process's own piece.*to_local\(\)"):
        parallel.wkv(arguments[0], of_tensor, *arguments[2:], group=None)
    with pytest.raises(ValueError, match="v: expected the shape of r"):
        parallel.wkv(*arguments[:2], arguments[2][:1], *arguments[3:], group=None)
    with pytest.raises(ValueError, match=r"x: expected 3 dimensions \[B, T, D\]"):
        parallel.token_shift(x[0], None, None)
    with pytest.raises(ValueError, match=r"shift: expected \[B, D\] = \(2, 4\)"):
        parallel.token_shift(x, shift[:1], None)
    with pytest.raises(ValueError, match=r"shift: expected \[M, D\] = \(3, 4\)"):
        parallel.token_shift(x[:1], shift, None, torch.tensor([0, 1, 2, 6]))
    with pytest.raises(ValueError, match="x: packed sequences need B = 1"):
        parallel.token_shift(x, shift, None, torch.tensor([0, 1, 6]))
    with pytest.raises(TypeError, match="cu_seqlens: expected int64 or int32"):
        parallel.token_shift(x[:1], None, None, torch.tensor([0.0, 6.0]))
    with pytest.raises(RuntimeError, match="cu_seqlens: the last must be T = 6, got 3"):
        parallel.token_shift(x[:1], None, None, torch.tensor([0, 3]))
    packed = [arguments[0][:1], *(x[:1] for x in arguments[1:4]), arguments[4]]
    with pytest.raises(RuntimeError, match="cu_seqlens: the last must be T = 6, got 3"):
        parallel.wkv(*packed, group=None, cu_seqlens=torch.tensor([0, 3]))


# ---- the launches


@pytest.mark.parametrize(
    ("size", "name"), [(n, name) for n, cases in CASES.items() for name in cases]
)
def test_over_processes(size: int, name: str, errors: dict[int, dict[str, str]]) -> None:
    assert not errors[size][name], errors[size][name]


def test_without_process_groups() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        parallel.wkv(*call_of_a_rank(), group=None)
