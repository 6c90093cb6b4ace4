"""`rwkv6::wkv_final_state`: the final state without y, of the same bits as the forward's."""

import oracle
import pytest
import torch
from samples import FLOAT_DTYPES, Call, random_call, relative_rms, sample_inputs

import torch_rwkv6
from torch_rwkv6 import chunked, reference

STATES = {torch.float64: 1e-14, torch.float32: 1e-6}  # against float64
PACKED = [0, 5, 5, 6, 70, 135]

final_state = torch.ops.rwkv6.wkv_final_state.default
has_kernels = pytest.mark.skipif(not torch_rwkv6.has_kernels, reason="there is no binary")


def arguments(call: Call) -> tuple[torch.Tensor | None, ...]:
    _, k, v, w, _, *others = call.args()
    return (k, v, w, *others)


def check(call: Call) -> None:
    found = final_state(*arguments(call))
    expected = torch.ops.rwkv6.wkv(*call.args())[1]
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    if torch_rwkv6.has_kernels:
        assert torch.equal(found, expected)
    else:
        assert relative_rms(found, expected) <= STATES[found.dtype]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", sample_inputs())
def test_every_option(name, dtype):
    for N, T in ((4, 5), (20, 70)):
        call = sample_inputs(dtype, N, T)[name]
        check(call)
        found = final_state(*arguments(call))
        expected = reference.wkv(*call.double().args())[1]
        assert relative_rms(found, expected) <= 1.5 * STATES[found.dtype]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 7, 24, 32, 64, 100, 128, 256])
def test_sizes_and_lengths(N, dtype):
    for T in (1, 3, 4, 8, 13, 66):
        check(random_call(B=1, T=T, H=2, N=N, dtype=dtype, extreme=True))
    check(random_call(B=1, T=135, H=1, N=N, dtype=dtype, cu_seqlens=PACKED, states=1))


def test_against_numpy():
    call = random_call(dtype=torch.float64, states=2)
    expected = oracle.wkv(*(x.numpy() for x in call.floats()))[1]
    assert relative_rms(final_state(*arguments(call)), torch.from_numpy(expected)) <= 1e-14


def test_any_strides():
    B, T, H, N = 2, 21, 3, 16
    fused = torch.randn(B, T, 3, H, N)
    k, v, w = fused.unbind(2)  # read in place
    across = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (k, v, w)]
    back = [x.flip(1) for x in (k, v, w)]
    expected = final_state(*(x.contiguous() for x in (k, v, w)))
    for given in ((k, v, w), across, [x.flip(1) for x in back]):
        assert torch.equal(final_state(*given), expected)


@has_kernels
def test_the_same_bits_on_any_number_of_threads():
    calls = [
        random_call(B=1, T=200, H=H, N=N, dtype=torch.bfloat16, states=1)
        for H, N in ((1, 64), (3, 100), (40, 32))
    ]
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append([final_state(*arguments(call)) for call in calls])
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("which", ["k", "v", "w"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_goes_where_the_recurrence_takes_it(which, value):
    for token in (0, 5, 16, 20):
        call = random_call(B=1, T=21, H=2, N=12, states=1)
        getattr(call, which)[0, token, 1, 3] = value
        call.r[:], call.u[:] = torch.nan, torch.nan  # nothing depends on them
        found = final_state(*arguments(call))
        finite = call.double()
        finite.r[:], finite.u[:] = 0, 0
        expected = reference.wkv(*finite.args())[1]
        reached = ~expected.isfinite()
        assert not reached[:, 0].any()
        assert reached.any() or (which == "w" and value == torch.inf)
        assert torch.equal(~found.isfinite(), reached)


@pytest.mark.parametrize("needs_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", sample_inputs())
def test_opcheck(name, needs_grad):
    call = sample_inputs(T=2)[name]
    call = call.leaves() if needs_grad else call
    torch.library.opcheck(final_state, arguments(call))


@pytest.mark.parametrize("name", ["state map", "packed, shared state"])
def test_derivatives(name):
    """Those of PyTorch's operations, which autograd records."""
    call = sample_inputs(torch.float64, T=20)[name].leaves()
    inputs = [call.k, call.v, call.w, call.initial_state]
    expected_state = torch.ops.rwkv6.wkv(*call.args())[1]
    found_state = final_state(*arguments(call))
    assert relative_rms(found_state, expected_state) <= 1e-14
    grad = torch.randn_like(found_state)
    found = torch.autograd.grad(found_state, inputs, grad)
    expected = torch.autograd.grad(expected_state, inputs, grad)
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(a, b) <= 1e-13


@pytest.mark.parametrize("dims", [(0, 1, None, 0, None), (None, None, None, None, 0)])
def test_vmap_equals_a_loop(dims):
    call = sample_inputs()["state map"]
    *floats, state_map, _ = arguments(call)
    given = [*floats, state_map]
    for i, dim in enumerate(dims):
        if dim is not None:
            given[i] = torch.stack([given[i], given[i].flip(0)], dim)
    found = torch.vmap(final_state, in_dims=dims)(*given)
    for i in range(2):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(given, dims, strict=True)]
        assert torch.equal(found[i], final_state(*one))
    nothing = [x if dim is None else x.narrow(dim, 0, 0) for x, dim in zip(given, dims)]
    assert torch.vmap(final_state, in_dims=dims)(*nothing).shape == (0, *found.shape[1:])


@pytest.mark.parametrize("T", [5, 40, 300])
@pytest.mark.parametrize("name", sample_inputs())
def test_where_there_is_no_kernel(name, T):
    call = sample_inputs(torch.float64, T=T)[name]
    found = chunked.wkv_final_state(*arguments(call))
    assert relative_rms(found, reference.wkv(*call.args())[1]) <= 1e-13


def test_what_is_wrong_is_named():
    k, v, w, *_ = arguments(random_call())
    for given, text in (
        ((k, v.double(), w), "v: expected float32"),
        ((k, v, w[:, :2]), "w: expected"),
        ((k[0], v, w), "k: expected"),
        ((k, v, w, None, torch.zeros(2, dtype=torch.int64)), "state_map: given without"),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=text):
            final_state(*given)
