"""torch_rwkv6.compat.fla: fla's signatures, log decays, scale, states and reversed walks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import pytest
import torch
from samples import Call, random_call, relative_rms
from torch import Tensor
from walk import walk

from torch_rwkv6 import wkv
from torch_rwkv6.compat.fla import chunk_rwkv6, fused_recurrent_rwkv6

REVERSED = functools.partial(fused_recurrent_rwkv6, reverse=True)
FACES = {"chunk": chunk_rwkv6, "recurrent": fused_recurrent_rwkv6, "reverse": REVERSED}
SPECIAL = {0.0: 0.15, float("-inf"): 0.1, -1e-20: 0.05, -1e-9: 0.05, -40.0: 0.05, -1e9: 0.05}


def log_decays(call: Call, special: bool = True) -> Call:
    """The call with w as log decays, some of them as far out as possible."""
    call.w = -torch.exp(call.w.double())
    place = torch.rand(call.w.shape)
    for value, share in SPECIAL.items() if special else ():
        call.w[place < share] = value
        place = torch.where(place < share, 2.0, place - share)
    call.w = call.w.to(call.r.dtype)
    return call


def expected(call: Call, scale: float, reverse: bool) -> tuple[Tensor, Tensor]:
    r, k, v, w, u, state = call.floats()
    return walk(scale * r, k, v, w.exp(), u, state, reverse=reverse)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(
    ("dtype", "T", "N", "scale", "bound"),
    [
        (torch.float64, 9, 8, None, 1e-14),
        (torch.float32, 9, 5, None, 1e-6),
        (torch.float32, 70, 16, 1.0, 1e-6),
        (torch.float32, 12, 8, -0.3, 1e-6),
        (torch.float32, 1, 32, None, 1e-6),
        (torch.bfloat16, 40, 16, None, 2.5e-3),
    ],
    ids=str,
)
def test_equals_the_recurrence_and_its_gradients(
    face: str, dtype: torch.dtype, T: int, N: int, scale: float | None, bound: float
) -> None:
    call = log_decays(random_call(T=T, N=N, dtype=dtype, states=2))
    grad_y, grad_state = call.grad_outputs()
    own, exact = call.leaves(), call.double().leaves()
    y, final = FACES[face](*own.floats()[:5], scale, own.initial_state, True)
    assert (y.dtype, final.dtype) == (dtype, call.initial_state.dtype)
    oracle = expected(exact, N**-0.5 if scale is None else scale, face == "reverse")
    grads = torch.autograd.grad((y, final), own.differentiable(), (grad_y, grad_state))
    oracle_grads = torch.autograd.grad(
        oracle, exact.differentiable(), (grad_y.double(), grad_state.double())
    )
    assert (call.w == 0).any()
    for found, x in zip((y, final, *grads), (*oracle, *oracle_grads), strict=True):
        assert relative_rms(found, x) < bound
    for value in SPECIAL:  # by themselves, as other gradients may be much larger
        place = call.w == torch.tensor(value, dtype=dtype)
        if place.any():
            found, x = grads[3][place], oracle_grads[3][place]
            # log(-w) and its exp are both rounded, and a decay exp(w) multiplies that error by w
            rounding = 2 * abs(value) * torch.finfo(final.dtype).eps if x.any() else 0.0
            assert relative_rms(found, x) < 2 * bound + rounding, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_log_decay_of_zero_keeps_the_state_bit_for_bit(dtype: torch.dtype) -> None:
    call = random_call(T=50, dtype=dtype, states=2)
    zero = torch.zeros_like(call.r)
    _, final = chunk_rwkv6(call.r, zero, zero, zero, call.u, None, call.initial_state, True)
    assert torch.equal(final, call.initial_state)


@pytest.mark.parametrize("rate", ["one", "many"])
def test_slow_decays_keep_their_digits(rate: str) -> None:
    call = random_call(B=1, T=1024, H=1, N=8, states=1)
    call.w.uniform_(-9, -9 if rate == "one" else -5)
    call = log_decays(call, special=False)
    found = chunk_rwkv6(*call.floats()[:5], 1.0, call.initial_state, True)
    for x, oracle in zip(found, expected(call.double(), 1.0, False), strict=True):
        assert relative_rms(x, oracle) < 2e-6


def test_a_positive_w_makes_its_key_nan_and_nothing_else() -> None:
    call = log_decays(random_call(T=6, states=2))
    call.w[0, 2, 1, 3] = 1e-3
    y, final = chunk_rwkv6(*call.floats()[:5], None, call.initial_state, True)
    nan_y, nan_state = torch.zeros_like(y).bool(), torch.zeros_like(final).bool()
    nan_y[0, 3:, 1] = nan_state[0, 1, 3] = True
    assert torch.equal(y.isnan(), nan_y)
    assert torch.equal(final.isnan(), nan_state)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("states", [None, 4])
@pytest.mark.parametrize("face", FACES)
def test_packed_sequences_equal_single_ones(
    face: str, states: int | None, index_dtype: torch.dtype
) -> None:
    bounds = [0, 3, 3, 8, 15]
    call = random_call(B=1, T=15, N=8, states=states, cu_seqlens=bounds, index_dtype=index_dtype)
    call = log_decays(call)
    *tokens, u, state = call.floats()
    y, final = FACES[face](
        *tokens, u, initial_state=state, output_final_state=True, cu_seqlens=call.cu_seqlens
    )
    assert final.shape == (4, 2, 8, 8)
    for m in range(4):
        part = slice(bounds[m], bounds[m + 1])
        single = FACES[face](
            *(x[:, part] for x in tokens),
            u,
            initial_state=None if state is None else state[m : m + 1],
            output_final_state=True,
        )
        torch.testing.assert_close(y[:, part], single[0])
        torch.testing.assert_close(final[m : m + 1], single[1])


@pytest.mark.parametrize("face", FACES)
def test_the_final_state_is_none_unless_asked_for(face: str) -> None:
    call = log_decays(random_call())
    inputs = call.floats()[:5]
    y, none = FACES[face](*inputs)
    assert none is None
    assert FACES[face](*inputs, output_final_state=None)[1] is None  # use_cache of fla's layers
    torch.testing.assert_close(y, FACES[face](*inputs, output_final_state=True)[0], rtol=0, atol=0)


def test_signatures_are_those_of_fla() -> None:
    def names(f: Callable[..., object]) -> list[str]:
        return [str(p).split(":")[0] for p in inspect.signature(f).parameters.values()]

    def defaults(f: Callable[..., object]) -> list[object]:
        return [p.default for p in inspect.signature(f).parameters.values()][5:]

    both = ["r", "k", "v", "w", "u", "scale", "initial_state", "output_final_state"]
    assert names(chunk_rwkv6) == [*both, "cu_seqlens", "cu_seqlens_cpu", "**kwargs"]
    assert names(fused_recurrent_rwkv6) == [*both, "reverse", "cu_seqlens"]
    assert defaults(chunk_rwkv6) == [None, None, False, None, None, inspect.Parameter.empty]
    assert defaults(fused_recurrent_rwkv6) == [None, None, False, False, None]


def test_arguments_that_have_no_effect_are_taken() -> None:
    call = random_call(B=1, T=5, cu_seqlens=[0, 2, 5])
    inputs = log_decays(call).floats()[:5]
    y, _ = chunk_rwkv6(*inputs, cu_seqlens=call.cu_seqlens)
    more = {"cu_seqlens_cpu": call.cu_seqlens, "chunk_size": 32}
    assert torch.equal(chunk_rwkv6(*inputs, cu_seqlens=call.cu_seqlens, **more)[0], y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"head_first": False}, TypeError, "head_first: no longer an argument.*transpose"),
        ({"reverse": True}, TypeError, "reverse: chunk_rwkv6 has no such argument"),
        ({"scale": "1"}, TypeError, "scale: expected a number"),
        ({"r": None}, TypeError, r"r: expected a torch.Tensor, got NoneType"),
        ({"w": 0.5}, TypeError, r"w: expected a torch.Tensor, got float"),
        (
            {"v": torch.ones(2, 5, 2, 8)},
            ValueError,
            r"v: expected the shape of r .*\(2, 5, 2, 8\)",
        ),
        ({"w": torch.ones(2, 4, 2, 4)}, ValueError, "w: expected the shape of r"),
        ({"u": torch.ones(4)}, ValueError, "u: expected"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens: .* B = 1"),
        ({"initial_state": torch.ones(3, 2, 4, 4)}, ValueError, "initial_state: 3 states"),
        ({"initial_state": torch.ones(2, 2, 4, 8)}, ValueError, "initial_state: expected"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input_is_named(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    given = dict(zip("rkvwu", log_decays(random_call()).floats())) | change
    with pytest.raises(error, match=message):
        chunk_rwkv6(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 5]}, "cu_seqlens: expected"),
        ({"k": [1.0]}, "k: expected a torch"),
    ],
)
def test_bad_input_of_a_reversed_walk_is_named(change: dict[str, object], message: str) -> None:
    given = dict(zip("rkvwu", log_decays(random_call(B=1)).floats())) | change
    with pytest.raises(TypeError, match=message):
        REVERSED(**given)


@pytest.mark.parametrize("face", FACES)
def test_compiles_in_one_graph(face: str) -> None:
    call = log_decays(random_call(states=2)).leaves()

    def step(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return FACES[face](*inputs[:5], None, inputs[5], True)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    outputs = [f(*call.floats()) for f in (compiled, step)]
    grads = [torch.autograd.grad(y.sum() + s.sum(), call.differentiable()) for y, s in outputs]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*grads)


def test_autocast_leaves_decays_and_states_in_float32() -> None:
    call = log_decays(random_call(N=16, states=2))  # a scale of 1 / 4 rounds nothing
    r, k, v, w, u, state = call.floats()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = chunk_rwkv6(r, k, v, w, u, None, state, True)
    low = chunk_rwkv6(r.bfloat16(), k.bfloat16(), v.bfloat16(), w, u, None, state, True)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, low[0])
    assert torch.equal(final, low[1])


def test_nothing_is_recorded_under_no_grad() -> None:
    call = log_decays(random_call(states=2)).leaves()
    with torch.no_grad():
        y, final = chunk_rwkv6(*call.floats()[:5], None, call.initial_state, True)
    assert not y.requires_grad
    assert not final.requires_grad


def test_minus_exp_of_raw_w_with_scale_1_is_wkv() -> None:
    call = random_call(T=30, N=16, states=2)
    r, k, v, w, u, state = call.floats()
    found = chunk_rwkv6(r, k, v, -w.exp(), u, 1.0, state, True)
    torch.testing.assert_close(found, wkv(r, k, v, w, u, state))
