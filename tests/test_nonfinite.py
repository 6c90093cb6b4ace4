"""A NaN or an infinity goes where the recurrence takes it, and no further."""

import math

import pytest
import torch
from samples import random_call, sample_inputs

from torch_rwkv6 import reference, reference4

NAMES = ("grad_y", "grad_final_state", "r", "k", "v", "w", "u", "initial_state")


def places(x, generator):
    """Some elements of x, as flat indices: its first, its last and two between."""
    last = x.numel() - 1
    return {0, last, *torch.randint(last + 1, (2,), generator=generator).tolist()}


def same_elements_are_finite(found, expected, what):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a.isfinite(), b.isfinite()), f"{what}, output {i}"


def check(call, *, forward, backward, values=(math.nan, math.inf, -math.inf)):
    """Puts one value at a time into each of the tensors of a call."""
    generator = torch.Generator().manual_seed(0)
    grads = call.grad_outputs()
    tensors = dict(zip(NAMES, (*grads, *call.floats()), strict=True))
    for name, x in tensors.items():
        if x is None or not x.numel():
            continue
        for value in values:
            for place in places(x, generator):
                broken = x.clone()
                broken.view(-1)[place] = value
                now = {**tensors, name: broken}
                grad_y, grad_state, *floats = now.values()
                args = (*floats, call.state_map, call.cu_seqlens)
                double = [y if y is None else y.double() for y in now.values()]
                exact = (*double[2:], call.state_map, call.cu_seqlens)
                what = f"{value} in {name} at {place}"
                same_elements_are_finite(forward(*args), reference.wkv(*exact), what)
                same_elements_are_finite(
                    backward(grad_y, grad_state, *args),
                    reference.wkv_backward(*double[:2], *exact),
                    what,
                )


@pytest.mark.parametrize("name", [name for name in sample_inputs() if name != "no token"])
def test_every_option(name):
    check(
        sample_inputs(N=8, T=9)[name],
        forward=torch.ops.rwkv6.wkv,
        backward=torch.ops.rwkv6.wkv_backward,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    call = random_call(B=1, T=22, H=5, N=16, dtype=dtype, states=1)
    check(call, forward=torch.ops.rwkv6.wkv, backward=torch.ops.rwkv6.wkv_backward)


@pytest.mark.parametrize("T", [1, 3, 4, 16, 39, 66])
@pytest.mark.parametrize("N", [5, 32, 64, 100])
def test_sizes_and_lengths(N, T):
    call = random_call(B=1, T=T, H=1 if N > 32 else 4, N=N, states=1)
    check(
        call,
        forward=torch.ops.rwkv6.wkv,
        backward=torch.ops.rwkv6.wkv_backward,
        values=[math.nan],
    )


def test_a_nan_in_every_token_of_a_chunk():
    call = random_call(B=1, T=16, H=4, N=32)
    grad_y, grad_state = call.grad_outputs()
    for t in range(16):
        broken = grad_y.clone()
        broken[0, t, 1, 3] = math.nan
        grads = torch.ops.rwkv6.wkv_backward(broken, grad_state, *call.args())
        grad_v = grads[2]
        assert grad_v[0, : t + 1, 1, 3].isnan().all()
        assert grad_v[0, t + 1 :].isfinite().all()
        assert grad_v[..., [0, 2, 3], :].isfinite().all()


def test_in_float32_the_reference_does_as_in_float64():
    call = random_call(B=1, T=5, H=2, N=3, states=1)
    check(call, forward=reference.wkv, backward=reference.wkv_backward)


@pytest.mark.parametrize("with_state", [False, True])
def test_wkv4(with_state):
    B, T, D = 2, 7, 11
    generator = torch.Generator().manual_seed(0)
    k, v, grad_y = (torch.randn(B, T, D, generator=generator) for _ in range(3))
    w, u = (torch.randn(D, generator=generator) for _ in range(2))
    grad_state = torch.randn(B, 3, D, generator=generator)
    state = torch.randn(B, 3, D, generator=generator).exp() if with_state else None
    tensors = [grad_y, grad_state, k, v, w, u, state]
    for i, x in enumerate(tensors):
        for value in (math.nan, math.inf, -math.inf) if x is not None else ():
            for place in places(x, generator):
                now = [y if y is None else y.clone() for y in tensors]
                now[i].view(-1)[place] = value
                exact = [y if y is None else y.double() for y in now]
                what = f"{value} in tensor {i} at {place}"
                same_elements_are_finite(
                    torch.ops.rwkv6.wkv4(*now[2:]), reference4.wkv4(*exact[2:]), what
                )
                same_elements_are_finite(
                    torch.ops.rwkv6.wkv4_backward(*now), reference4.wkv4_backward(*exact), what
                )


def test_wkv4_without_a_gradient_of_y_takes_nothing_from_y():
    k, v = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    w, u = torch.randn(4), torch.full((4,), math.nan)
    grads = torch.ops.rwkv6.wkv4_backward(None, torch.ones(1, 3, 4), k, v, w, u, None)
    assert all(x.isfinite().all() for x in grads)
