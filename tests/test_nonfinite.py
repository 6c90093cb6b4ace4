"""A NaN or an infinity goes where the recurrence takes it, and no further."""

import itertools
import math

import pytest
import torch
from samples import random_call, sample_inputs

from torch_rwkv6 import reference, reference4

KERNELS = (torch.ops.rwkv6.wkv, torch.ops.rwkv6.wkv_backward)
NAMES = ("grad_y", "grad_final_state", "r", "k", "v", "w", "u", "initial_state")


def places(x, generator):
    """Some elements of x, as flat indices: its first, its last and two between."""
    last = x.numel() - 1
    return {0, last, *torch.randint(last + 1, (2,), generator=generator, device="cpu").tolist()}


def same_elements_are_finite(found, expected, what):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a.isfinite(), b.isfinite()), f"{what}, output {i}"


def check(call, forward, backward, values=(math.nan, math.inf, -math.inf)):
    """Puts one value at a time into each of the tensors of a call.

    In turn the gradients come from both outputs, from y alone and from the state alone.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    tensors = dict(zip(NAMES, (*call.grad_outputs(), *call.floats()), strict=True))
    maps = (call.state_map, call.cu_seqlens)
    sources = itertools.cycle(((0, 1), (0,), (1,)))
    for name, x in tensors.items():
        for value in values if x is not None else ():
            for place in places(x, generator):
                broken = x.clone()
                broken.view(-1)[place] = value
                now = list({**tensors, name: broken}.values())
                source = next(sources)
                now[:2] = (now[i] if i in source else None for i in (0, 1))
                exact = [y if y is None else y.double() for y in now]
                what = f"{value} in {name} at {place}"
                same_elements_are_finite(
                    forward(*now[2:], *maps), reference.wkv(*exact[2:], *maps), what
                )
                same_elements_are_finite(
                    backward(*now, *maps), reference.wkv_backward(*exact, *maps), what
                )


@pytest.mark.parametrize("name", [name for name in sample_inputs() if name != "no token"])
def test_every_option(name):
    check(sample_inputs(N=8, T=5)[name], *KERNELS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(dtype):
    check(random_call(B=1, T=18, H=5, N=16, dtype=dtype, states=1), *KERNELS, [math.nan])


@pytest.mark.parametrize(("N", "T"), [(5, 39), (32, 16), (64, 67), (100, 18), (128, 3)])
def test_sizes_and_lengths(N, T):
    check(random_call(B=1, T=T, H=1 if N > 64 else 4, N=N, states=1), *KERNELS, [math.nan])


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
    check(call, reference.wkv, reference.wkv_backward)


@pytest.mark.parametrize("outputs", [(0, 1), (0,), (1,)], ids=["both", "y", "final state"])
def test_the_backward_of_the_reference_does_as_autograd(outputs):
    call = random_call(B=1, T=3, H=1, N=3, dtype=torch.float64, states=1)
    grads = call.grad_outputs()
    given = [x if i in outputs else None for i, x in enumerate(grads)]
    for i, x in enumerate(call.floats()):
        for place in range(x.numel()):
            floats = [y.clone() for y in call.floats()]
            floats[i].view(-1)[place] = math.nan
            leaves = [y.requires_grad_() for y in floats]
            results = reference.recurrence(*leaves)
            expected = torch.autograd.grad(
                [results[o] for o in outputs],
                leaves,
                [grads[o] for o in outputs],
                materialize_grads=True,
            )
            found = reference.wkv_backward(*given, *floats)
            same_elements_are_finite(found, expected, f"input {i} at {place}")


@pytest.mark.parametrize("with_state", [False, True])
def test_wkv4(with_state):
    B, T, D = 2, 7, 11
    device, generator = torch.get_default_device(), torch.Generator("cpu").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cpu").to(device)

    k, v, grad_y = (normal(B, T, D) for _ in range(3))
    w, u = (normal(D) for _ in range(2))
    grad_state = normal(B, 3, D)
    state = normal(B, 3, D).exp() if with_state else None
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
