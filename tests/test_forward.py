"""Forward: the kernels equal the recurrence in float64, for every dtype, size and option."""

import pytest
import torch
from samples import (
    FLOAT_DTYPES,
    SLOW_DECAYS,
    random_call,
    relative_rms,
    sample_inputs,
    slow_call,
)

import torch_rwkv6
from torch_rwkv6 import reference, wkv, wkv_update

# Against float64. bfloat16 and float16 are bounded by the rounding of the output: 1.66e-3 and
# 2.1e-4 for the exact answer rounded.
Y_TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 2.5e-3,
    torch.float16: 3.2e-4,
}
STATE_TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-6,
    torch.float16: 1e-6,
}
SAMPLES = list(sample_inputs())


def check(call, tolerance=1.0):
    y, state = wkv(*call.floats(), state_map=call.state_map, cu_seqlens=call.cu_seqlens)
    expected_y, expected_state = reference.wkv(*call.double().args())
    dtype = call.r.dtype
    assert y.dtype == dtype
    assert state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_rms(y, expected_y) <= tolerance * Y_TOLERANCE[dtype]
    assert relative_rms(state, expected_state) <= tolerance * STATE_TOLERANCE[dtype]


def test_the_kernels_are_there():
    assert torch_rwkv6.has_kernels


@pytest.mark.parametrize("T", [0, 1, 2, 63, 1024])
@pytest.mark.parametrize("N", [1, 8, 64, 100, 128])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_accuracy_with_extreme_decays(dtype, N, T):
    heads = max(2, 256 // N)  # enough elements for a root mean square
    check(
        random_call(B=2, T=T, H=heads if T < 100 else 2, N=N, dtype=dtype, extreme=True, states=2)
    )


def test_accuracy_at_4096_tokens():
    check(random_call(B=1, T=4096, H=2, N=64, extreme=True))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_options(name, dtype):
    check(sample_inputs(dtype)[name], tolerance=2.0)


@pytest.mark.parametrize("N", [*range(1, 20), 31, 32, 33, 48, 80, 127, 255, 256])
def test_every_head_size(N):
    check(random_call(B=1, T=18, H=3, N=N, states=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_initial_state_in_the_inputs_dtype(dtype):
    check(random_call(T=20, N=40, H=8, dtype=dtype, states=2, state_dtype=dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_half_precision_values_are_read_and_written_exactly(dtype):
    # one token without state: y = (r . u k) v = v for r = k = u = 1, N = 1
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    source = torch.float16 if dtype == torch.float16 else torch.bfloat16
    v = bits.view(source)
    v = v[v.isfinite() & ((v.abs() >= torch.finfo(torch.bfloat16).tiny) | (v == 0))].to(dtype)
    v = v.view(1, 1, -1, 1)
    one = torch.ones_like(v)
    y, _ = wkv(one, one, v, one, one[0, 0])
    assert torch.equal(y, v)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_strided_views_are_read_in_place(dtype):
    B, T, H, N = 2, 21, 3, 20
    C = H * N
    fused = torch.randn(B, T, 4 * C + 7, dtype=torch.float64).to(dtype)
    r, k, v, w = (fused[..., i * C : (i + 1) * C].view(B, T, H, N) for i in range(4))
    u = torch.randn(N, H, dtype=torch.float64).to(dtype).T  # not contiguous in its last dimension
    y, state = wkv(r, k, v, w, u)
    dense = [x.contiguous() for x in (r, k, v, w, u)]
    expected_y, expected_state = wkv(*dense)
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected_state)


def test_heads_first_and_expanded_inputs():
    B, T, H, N = 2, 9, 3, 16
    r, k, v = (torch.randn(B, H, T, N).transpose(1, 2) for _ in range(3))
    w = torch.randn(H, N).expand(B, T, H, N)  # RWKV-5: one decay for all tokens
    u, state = torch.randn(H, N), torch.randn(1, H, N, N)
    found = wkv(r, k, v, w, u, state)
    expected = wkv(*(x.contiguous() for x in (r, k, v, w)), u, state)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_infinite_decays():
    call = random_call(T=40, N=16, states=2)
    call.w[:, 5] = torch.inf
    call.w[:, 7] = -torch.inf
    check(call)


def test_padding_leaves_the_state_bit_for_bit():
    call = random_call(B=2, T=50, H=2, N=24, states=2)
    call.w[:] = -1e9
    call.k[:] = 0
    call.v[:] = 0
    _, state = wkv(*call.floats())
    assert torch.equal(state, call.initial_state)


def test_nan_spreads_to_what_depends_on_it():
    call = random_call(B=2, T=6, H=2, N=8)
    call.w[0, 2, 1, 3] = torch.nan
    y, state = wkv(*call.floats())
    assert state[0, 1, 3].isnan().all()
    assert y[0, 3:, 1].isnan().all()
    assert y[1].isfinite().all()
    assert y[0, :, 0].isfinite().all()


@pytest.mark.cpu
def test_a_dying_state_does_not_change_the_processes_rounding():
    # 1e-38 / 2 is a denormal: if the kernels left flush-to-zero on, it would be 0 afterwards
    tiny = torch.tensor([1.2e-38])
    wkv(*random_call(T=100, extreme=True).floats())
    assert (tiny / 2).item() != 0


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_large_states_and_long_memory(dtype):
    # w = -8: a state element lives for 3000 tokens, in which a rounding of its decay would add up
    call = random_call(B=1, T=2000, H=2, N=8, dtype=dtype, states=1)
    call.w.fill_(-8)
    check(call, tolerance=10.0 if dtype == torch.float64 else 1.0)


@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_decay_that_vanishes_forgets_any_state(dtype, T):
    """exp(-exp(5)) is 3.5e-65: of 1e30 nothing is left, and what is added is not lost in it."""
    call = random_call(B=1, T=T, H=1, N=32, dtype=dtype, states=1)
    call.initial_state.fill_(1e30)
    call.r[:, 0] = 0  # the first token reads the old state
    call.w[:, 0] = torch.tensor([5.0, 20.0, 88.0, 90.0] * 8)
    check(call)


@pytest.mark.parametrize("decays", SLOW_DECAYS)
def test_slow_decays(decays):
    check(slow_call(decays))


@pytest.mark.parametrize("decays", SLOW_DECAYS)
@pytest.mark.parametrize("piece", [1, 4, 7])
def test_slow_decays_in_pieces(decays, piece):
    call = slow_call(decays)
    expected_y, expected_state = reference.wkv(*call.double().args())
    state, y = call.initial_state.clone(), []
    for t in range(0, call.r.shape[1], piece):
        tokens = (x[:, t : t + piece] for x in call.floats()[:4])
        y.append(wkv_update(*tokens, call.u, state))
    assert relative_rms(torch.cat(y, 1), expected_y) <= 2e-6
    assert relative_rms(state, expected_state) <= 2e-6


def test_inputs_are_never_changed():
    call = sample_inputs()["state map"]
    before = [x.clone() for x in call.args() if x is not None]
    wkv(*call.floats(), state_map=call.state_map)
    assert all(torch.equal(a, b) for a, b in zip(before, (x for x in call.args() if x is not None)))


def test_outputs_are_fresh_memory():
    call = random_call(T=0, states=2)
    _, state = wkv(*call.floats())
    assert torch.equal(state, call.initial_state)
    assert state.data_ptr() != call.initial_state.data_ptr()


@pytest.mark.parametrize("B", [0, 1])
def test_no_batch_row(B):
    y, state = wkv(*random_call(B=B, T=3, H=2, N=4).floats())
    assert y.shape == (B, 3, 2, 4)
    assert state.shape == (B, 2, 4, 4)


def test_two_head_sizes_in_one_process():
    for N in (64, 32, 64):
        check(random_call(B=1, T=8, H=2, N=N))


@pytest.mark.cpu
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["one head", "one small head", "many heads", "packed"])
def test_results_do_not_depend_on_the_thread_count(name):
    call = {
        "one head": random_call(B=1, T=600, H=1, N=100, states=1),
        "one small head": random_call(B=1, T=600, H=1, N=70, states=1),
        "many heads": random_call(B=2, T=64, H=9, N=64, states=1),
        "packed": random_call(B=1, T=400, H=3, N=40, states=1, cu_seqlens=[0, 100, 399, 400]),
    }[name]
    two = torch.ops.rwkv6.wkv(*call.args())
    torch.set_num_threads(1)
    one = torch.ops.rwkv6.wkv(*call.args())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
