"""WKV6 by chunks, which serves what has no kernel: it equals the recurrence, derivatives included.

Chunks and segments are small here, so that a few tokens lie in several of them.
"""

import itertools
import math

import pytest
import torch
from samples import SLOW_DECAYS, random_call, relative_rms, sample_inputs, slow_call
from test_nonfinite import check

from torch_rwkv6 import chunked, reference, wkv

SAMPLES = [name for name in sample_inputs() if name not in ("no token", "w in float32")]
T = 11  # in chunks of 4: the first one begins with padding


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(chunked, "SHORT", 1)
    monkeypatch.setattr(chunked, "CHUNK", 4)


@pytest.fixture(params=["one segment", "many segments"])
def segments(request, monkeypatch):
    monkeypatch.setattr(chunked, "SEGMENT", 1 if request.param == "many segments" else 1 << 20)


def double(call):
    return [x if x is None else x.double() for x in call]


def assert_right(call, limit):
    """y, the final state and all gradients, in float64 against the recurrence."""
    grads = call.grad_outputs()
    exact = call.double().args()
    found, expected = chunked.wkv(*call.args()), reference.wkv(*exact)
    for given in itertools.product((True, False), repeat=2):
        some = [g if on else None for g, on in zip(grads, given, strict=True)]
        found = (*found, *chunked.wkv_backward(*some, *call.args()))
        expected = (*expected, *reference.wkv_backward(*double(some), *exact))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.is_contiguous()
        assert relative_rms(a, b) <= limit


@pytest.mark.parametrize("tokens", [4, T])
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.usefixtures("segments")
def test_every_option(name, tokens):
    assert_right(sample_inputs(torch.float64, T=tokens)[name].double(), 2e-15)


@pytest.mark.parametrize("cu_seqlens", [[0, 40], [0, 1, 2, 40], [0, 0, 8, 8, 12, 39, 40, 40]])
@pytest.mark.usefixtures("segments")
def test_packed_sequences_of_any_length(cu_seqlens):
    call = random_call(B=1, T=40, dtype=torch.float64, extreme=True, cu_seqlens=cu_seqlens)
    assert_right(call, 2e-15)


@pytest.mark.parametrize("N", [1, 5, 100])
@pytest.mark.parametrize("H", [1, 3])
def test_sizes(N, H):
    assert_right(random_call(B=3, T=9, H=H, N=N, dtype=torch.float64, states=3), 2e-15)


@pytest.mark.parametrize(
    "options",
    [{"B": 0}, {"H": 0}, {"B": 0, "states": 2, "state_map": []}, {"B": 0, "H": 0, "states": 1}],
    ids=str,
)
def test_no_sequence_or_no_head(options):
    assert_right(random_call(T=T, dtype=torch.float64, **options), 0)


@pytest.mark.parametrize(
    ("dtype", "limits"),
    [(torch.float32, (1e-6, 5e-6)), (torch.bfloat16, (2.5e-3,) * 2), (torch.float16, (3e-4,) * 2)],
    ids=str,
)
def test_accuracy_with_extreme_decays(dtype, limits, monkeypatch):
    monkeypatch.undo()  # chunks as they are used
    call = random_call(B=2, T=300, H=2, N=32, dtype=dtype, extreme=True, states=2)
    grads = call.grad_outputs()
    exact = call.double().args()
    found = (chunked.wkv(*call.args()), chunked.wkv_backward(*grads, *call.args()))
    expected = (reference.wkv(*exact), reference.wkv_backward(*double(grads), *exact))
    for some, right, limit in zip(found, expected, limits, strict=True):
        for a, b in zip(some, right, strict=True):
            assert relative_rms(a, b) <= limit
    assert [x.dtype for x in found[1]] == [x.dtype for x in call.differentiable()]


@pytest.mark.parametrize("decays", SLOW_DECAYS)
def test_slow_decays_in_float32(decays, monkeypatch):
    monkeypatch.undo()
    call = slow_call(decays)
    grads = call.grad_outputs()
    exact = call.double().args()
    found = (*chunked.wkv(*call.args()), *chunked.wkv_backward(*grads, *call.args()))
    expected = (*reference.wkv(*exact), *reference.wkv_backward(*double(grads), *exact))
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(a, b) <= 2e-6


def test_padding_leaves_the_state_bit_for_bit():
    call = random_call(T=T, states=2)
    call.w[:], call.k[:], call.v[:] = -1e9, 0, 0
    _, state = chunked.wkv(*call.args())
    assert torch.equal(state, call.initial_state)


def test_a_state_that_is_not_there_is_nan():
    call = random_call(B=3, T=T, states=2, state_map=[1, 2, -1])
    y, state = chunked.wkv(*call.args())
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()
    assert state[1:].isnan().all()


@pytest.mark.parametrize(
    ("name", "segment"), [("plain", 1), ("packed, state map", 1 << 20), ("packed, state map", 1)]
)
def test_a_nan_or_an_infinity_goes_where_the_recurrence_takes_it(name, segment, monkeypatch):
    monkeypatch.setattr(chunked, "SEGMENT", segment)
    call = sample_inputs(N=2, T=6)[name]
    call.w[0, ::2, :, 1] = 20.0
    call.w[0, 3, :, 0] = -1e9
    check(call, chunked.wkv, chunked.wkv_backward, (math.nan, math.inf))


def derivatives(name, *, tokens=T, requires_grad=False):
    """A call by the recurrence and by chunks as functions of the differentiable inputs."""
    call = sample_inputs(torch.float64, N=2, T=tokens)[name].double()
    call = call.leaves() if requires_grad else call

    def function(f):
        return lambda *floats: f(
            *floats, *[None] * (6 - len(floats)), call.state_map, call.cu_seqlens
        )

    return tuple(call.differentiable()), function(chunked.wkv), function(reference.wkv)


@pytest.mark.parametrize("name", ["state each", "packed, state map"])
@pytest.mark.usefixtures("segments")
def test_double_backward(name):
    """Of the registered operator: kernels forward and backward, then chunks."""
    x, f, g = derivatives(name, requires_grad=True)
    call = sample_inputs(torch.float64, N=2, T=T)[name]

    def second(h):
        first = torch.autograd.grad(sum(y.sin().sum() for y in h(*x)), x, create_graph=True)
        return torch.autograd.grad(sum(y.sin().sum() for y in first), x)

    def operator(*floats):
        return torch.ops.rwkv6.wkv(*floats, call.state_map, call.cu_seqlens)

    expected = second(g)
    for found in (second(f), second(operator)):
        for a, b in zip(found, expected, strict=True):
            assert relative_rms(a, b) < 1e-12


@pytest.mark.parametrize("name", ["plain", "packed, state map"])
def test_transforms(name):
    x, f, g = derivatives(name)
    tangents = tuple(torch.randn_like(a) for a in x)
    every = tuple(range(len(x)))

    def loss(h):
        return lambda *a: sum(out.sin().sum() for out in h(*a))

    def slope(h):
        return lambda *a: torch.func.grad(loss(h), every)(*a)

    def results(h):
        return (
            *torch.func.jvp(h, x, tangents)[1],  # forward mode
            *slope(h)(*x),
            *torch.func.jvp(slope(h), x, tangents)[1],  # forward over reverse
            *torch.func.grad(lambda *a: sum(y.sin().sum() for y in slope(h)(*a)), every)(*x),
        )

    for a, b in zip(results(f), results(g), strict=True):
        assert relative_rms(a, b) < 1e-12


def test_inputs_stay_as_they_are():
    """Also with one head and one chunk, where views would do for copies."""
    call = random_call(B=1, T=4, H=1, states=1)
    before = [x.clone() for x in call.floats()]
    chunked.wkv(*call.args())
    chunked.wkv_backward(*call.grad_outputs(), *call.args())
    assert all(torch.equal(a, b) for a, b in zip(call.floats(), before, strict=True))


@pytest.mark.parametrize("which", range(6))
def test_double_backward_of_one_input(which):
    """What the others are made of is not kept for it, and may not be changed for it."""
    call = random_call(T=T, N=2, dtype=torch.float64, states=2)
    grads = call.grad_outputs()
    results = []
    for f in (chunked, reference):
        x = list(call.floats())
        x[which] = x[which].clone().requires_grad_()
        y = f.wkv(*x)
        first = f.wkv_backward(*grads, *x)
        loss = sum(z.sin().sum() for z in (*y, *first))
        results.append(torch.autograd.grad(loss, x[which])[0])
    assert relative_rms(*results) < 1e-12


def test_forward_mode_of_the_backward_operator():
    call = random_call(T=T, N=2, dtype=torch.float64, states=2)
    grads = call.grad_outputs()
    found = []
    for f in (torch.ops.rwkv6.wkv_backward, reference.wkv_backward):
        with torch.autograd.forward_ad.dual_level():
            k = torch.autograd.forward_ad.make_dual(call.k, call.v)
            outputs = f(*grads, call.r, k, call.v, call.w, call.u, call.initial_state, None, None)
            duals = [torch.autograd.forward_ad.unpack_dual(x) for x in outputs]
            found.append([y for dual in duals for y in dual if y is not None])
    assert len(found[0]) == len(found[1]) > 6
    for a, b in zip(*found, strict=True):
        assert relative_rms(a, b) < 1e-12


def test_per_sample_gradients():
    call = random_call(B=3, T=T, dtype=torch.float64)
    x = (call.u, call.r, call.k, call.v, call.w)

    def loss(f):
        def one(u, *tokens):
            return f(*(y[None] for y in tokens), u)[0].pow(2).sum()

        return torch.vmap(torch.func.grad(one), in_dims=(None, 0, 0, 0, 0))

    assert relative_rms(loss(wkv)(*x), loss(reference.wkv)(*x)) < 1e-12


@pytest.mark.parametrize("mapped", range(5))
def test_vmap_over_one_input(mapped):
    call = random_call(T=T, dtype=torch.float64)
    x = list(call.floats()[:5])
    x[mapped] = torch.randn(2, *x[mapped].shape, dtype=torch.float64)
    dims = tuple(0 if i == mapped else None for i in range(5))
    for a, b in zip(*(torch.vmap(f.wkv, dims)(*x) for f in (chunked, reference)), strict=True):
        assert relative_rms(a, b) < 1e-14


def test_torch_func_inside_torch_compile():
    call = random_call(T=T, dtype=torch.float64)

    def slope(f):
        return lambda *x: torch.func.grad(lambda *x: f(*x)[0].sin().sum(), argnums=(0, 1, 2, 3))(*x)

    compiled = torch.compile(slope(wkv), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (6, 5):
        x = [y[:, :tokens] for y in call.floats()[:4]] + [call.u]
        for a, b in zip(compiled(*x), slope(reference.wkv)(*x), strict=True):
            assert relative_rms(a, b) < 1e-12


def test_is_not_rounded_under_autocast():
    call = random_call(B=1, T=T, cu_seqlens=[0, 5, T])
    grads = call.grad_outputs()
    expected = [*chunked.wkv(*call.args()), *chunked.wkv_backward(*grads, *call.args())]
    with torch.autocast("cpu", torch.bfloat16):
        found = [*chunked.wkv(*call.args()), *chunked.wkv_backward(*grads, *call.args())]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("tokens", "by_chunks"), [(0, False), (T - 1, False), (T, True)])
def test_few_tokens_go_by_the_recurrence(tokens, by_chunks, monkeypatch):
    monkeypatch.setattr(chunked, "SHORT", T)
    call = random_call(T=tokens, N=16, states=2)
    grads = call.grad_outputs()
    found = (*chunked.wkv(*call.args()), *chunked.wkv_backward(*grads, *call.args()))
    expected = (*reference.wkv(*call.args()), *reference.wkv_backward(*grads, *call.args()))
    equal = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert equal is not by_chunks  # bit for bit
