"""wkv_update: decode, prefill in pieces and state pools, in place; nothing else is touched."""

import collections
import itertools
import random

import numpy as np
import pytest
import torch
from samples import FLOAT_DTYPES, random_call

from torch_rwkv6 import wkv, wkv_update


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 8, 20, 64, 256])
def test_equals_wkv(N, dtype):
    call = random_call(T=19, N=N, dtype=dtype, states=2, extreme=True)
    *inputs, state = call.floats()
    expected_y, expected_state = wkv(*inputs, state)
    assert torch.equal(wkv_update(*inputs, state), expected_y)
    assert torch.equal(state, expected_state)


def test_any_split_gives_the_same_bits():
    call = random_call(B=2, T=70, H=3, N=24, states=2)
    r, k, v, w, u, start = call.floats()
    whole = start.clone()
    expected = wkv_update(r, k, v, w, u, whole)
    for cuts in ([0, 70], [0, 1, 70], [0, 16, 32, 48, 70], [0, 5, 6, 40, 40, 70], range(71)):
        state = start.clone()
        y = [
            wkv_update(r[:, a:b], k[:, a:b], v[:, a:b], w[:, a:b], u, state)
            for a, b in itertools.pairwise(cuts)
        ]
        torch.testing.assert_close(torch.cat(y, 1), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_pool_of_states(index_dtype):
    """Rows by state_map; -1 is padding; the rows nobody names stay as they are."""
    call = random_call(B=4, T=3, N=8, states=6, state_map=[4, -1, 0, -7], index_dtype=index_dtype)
    *inputs, pool = call.floats()
    before = pool.clone()
    y = wkv_update(*inputs, pool, state_map=call.state_map)
    for b, slot in ((0, 4), (2, 0)):
        row = [x[b : b + 1] for x in inputs[:4]]
        expected_y, expected_state = wkv(*row, inputs[4], before[slot : slot + 1])
        assert torch.equal(y[b : b + 1], expected_y)
        assert torch.equal(pool[slot], expected_state[0])
    assert (y[[1, 3]] == 0).all()
    assert torch.equal(pool[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


def test_packed_sequences_in_a_pool():
    call = random_call(B=1, T=9, N=8, states=5, cu_seqlens=[0, 4, 4, 6, 9], state_map=[3, 1, -1, 0])
    *inputs, pool = call.floats()
    before = pool.clone()
    y = wkv_update(*inputs, pool, state_map=call.state_map, cu_seqlens=call.cu_seqlens)
    for first, last, slot in ((0, 4, 3), (6, 9, 0)):
        piece = [x[:, first:last] for x in inputs[:4]]
        expected_y, expected_state = wkv(*piece, inputs[4], before[slot : slot + 1])
        assert torch.equal(y[:, first:last], expected_y)
        assert torch.equal(pool[slot], expected_state[0])
    assert (y[:, 4:6] == 0).all()
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])


def test_state_in_a_larger_buffer_is_updated_in_place():
    call = random_call(B=2, T=4, H=3, N=12, states=2)
    *inputs, state = call.floats()
    buffer = torch.full((2, 5, 3, 14, 20), 7.0)
    view = buffer[:, 2, :, 1:13, 4:16]
    view.copy_(state)
    expected_y, expected_state = wkv(*inputs, state)
    assert torch.equal(wkv_update(*inputs, view), expected_y)
    assert torch.equal(view, expected_state)
    view.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.parametrize(
    "bad",
    [
        "shape",
        "overlap",
        *(
            pytest.param(bad, marks=pytest.mark.cpu)
            for bad in ("state_map", "repeated", "cu_seqlens")
        ),
    ],
)
def test_a_refused_call_changes_nothing(bad):
    call = random_call(B=2, T=3, states=3, state_map=[0, 1])
    r, k, v, w, u, state = call.floats()
    state_map, cu_seqlens = call.state_map, None
    if bad == "shape":
        k = k[:, 1:]
    elif bad == "state_map":
        state_map = torch.tensor([0, 3])
    elif bad == "repeated":
        state_map = torch.tensor([1, 1])
    elif bad == "cu_seqlens":
        r, k, v, w = (x[:1] for x in (r, k, v, w))
        cu_seqlens = torch.tensor([0, 2, 1])
    else:
        state = state[:1].expand(3, -1, -1, -1)
    before = state.clone()
    with pytest.raises((ValueError, RuntimeError)):
        wkv_update(r, k, v, w, u, state, state_map=state_map, cu_seqlens=cu_seqlens)
    assert torch.equal(state, before)


def test_version_counter_moves():
    for mode in (torch.no_grad, torch.inference_mode):
        call = random_call(states=2)
        before = call.initial_state._version
        with mode():
            wkv_update(*call.floats())
        assert call.initial_state._version == before + 1


@pytest.mark.cpu
def test_a_refused_call_does_not_disturb_autograd():
    call = random_call(states=2)
    x, state = torch.ones_like(call.initial_state).requires_grad_(), call.initial_state
    loss = (x * state).sum()  # saves state
    with torch.no_grad(), pytest.raises(RuntimeError, match="state_map"):
        wkv_update(*call.floats(), state_map=torch.tensor([0, 9]))
    loss.backward()
    assert torch.equal(x.grad, state)


@pytest.mark.parametrize("name", ["r", "v", "u"])
def test_a_state_that_shares_memory_with_an_input_is_refused(name):
    call = random_call(B=2, T=1, H=2, N=4)
    buffer = torch.randn(2 * 2 * 4 * 4)
    x = getattr(call, name)
    setattr(call, name, buffer[: x.numel()].view(x.shape))
    before = buffer.clone()
    with pytest.raises(RuntimeError, match=f"state: .*shares memory with {name}"):
        wkv_update(call.r, call.k, call.v, call.w, call.u, buffer.view(2, 2, 4, 4))
    assert torch.equal(buffer, before)


def places(x):
    """Where in its storage each element of x lies."""
    places = np.full((), x.storage_offset())
    for step, size in zip(x.stride(), x.shape):
        places = places[..., None] + step * np.arange(size)
    return places.ravel()


@pytest.mark.cpu
def test_memory_is_shared_or_not_exactly():
    """States and inputs as views of one buffer with strides of every kind: refused if and only if
    an element belongs to two places, and otherwise as if each had memory of its own."""
    draw = random.Random(0)
    outcomes = collections.Counter()

    def view(buffer, shape, first, steps):
        strides = [*(draw.choice(steps) for _ in range(3)), 1]  # the last dimension is contiguous
        last = first + sum(step * (size - 1) for step, size in zip(strides, shape))
        return buffer.as_strided(shape, strides, first) if last < buffer.numel() else None

    for _ in range(3000):
        buffer = torch.randn(80)
        S, H, N = draw.randint(1, 3), draw.randint(1, 2), draw.randint(1, 3)
        state = view(buffer, (S, H, N, N), draw.randrange(8), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12))
        r = view(buffer, (S, 1, H, N), draw.randrange(40), (1, 2, 3, 4, 6, 8, 10))
        if state is None or r is None:
            continue
        others = [torch.randn(S, 1, H, N) for _ in range(3)] + [torch.randn(H, N)]
        expected = "works"
        if len(set(places(state))) < state.numel():
            expected = "state: .*its elements overlap"
        elif set(places(state)) & set(places(r)):
            expected = "state: .*shares memory with r"
        outcomes[expected] += 1
        own_r, own_state = r.clone(), state.clone()
        if expected == "works":
            y = torch.ops.rwkv6.wkv_update(r, *others, state)
            assert torch.equal(y, torch.ops.rwkv6.wkv_update(own_r, *others, own_state))
            assert torch.equal(state, own_state)
        else:
            with pytest.raises(RuntimeError, match=expected):
                torch.ops.rwkv6.wkv_update(r, *others, state)
    assert len(outcomes) == 3
    assert min(outcomes.values()) > 100


def test_a_state_that_negates_other_memory_is_refused():
    call = random_call(states=2)
    *inputs, state = call.floats()
    before = state.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError, match=r"state: .*negates.*resolve_neg\(\)"):
            wkv_update(*inputs, torch._neg_view(state))
    assert torch.equal(state, before)
    inputs[0] = torch._neg_view(inputs[0])  # an input may
    y, final_state = wkv(*inputs, before)
    assert torch.equal(wkv_update(*inputs, state), y)
    assert torch.equal(state, final_state)


@pytest.mark.cpu
@pytest.mark.usefixtures("two_threads")
def test_states_do_not_depend_on_the_thread_count():
    """Long enough for heads to walk on a copy of their state, where threads meet."""
    call = random_call(B=4, T=200, H=3, N=40, states=5, state_map=[4, -1, 0, 2])
    *inputs, pool = call.floats()
    two, one = pool.clone(), pool.clone()
    y = wkv_update(*inputs, two, state_map=call.state_map)
    torch.set_num_threads(1)
    assert torch.equal(wkv_update(*inputs, one, state_map=call.state_map), y)
    assert torch.equal(one, two)
    assert torch.equal(one[[1, 3]], pool[[1, 3]])
    assert not torch.equal(one[[0, 2, 4]], pool[[0, 2, 4]])
