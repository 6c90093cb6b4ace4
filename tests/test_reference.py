"""The reference itself: against the equations in NumPy, and its backward against autograd."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from samples import SLOW_DECAYS, random_call, relative_rms, sample_inputs, slow_call

from torch_rwkv6 import reference

SAMPLES = list(sample_inputs())


def test_recurrence_equals_the_equations():
    call = random_call(B=2, T=6, H=2, N=5, dtype=torch.float64, extreme=True, states=2)
    y, state = reference.recurrence(*call.floats())
    expected_y, expected_state = oracle.wkv(*(x.numpy() for x in call.floats()))
    np.testing.assert_allclose(y, expected_y, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(state, expected_state, rtol=1e-13, atol=1e-13)


def test_packed_sequences_equal_separate_ones():
    call = sample_inputs(torch.float64)["packed, state map"]
    y, state = reference.wkv(*call.args())
    offsets = call.cu_seqlens.tolist()
    for m, (a, b) in enumerate(itertools.pairwise(offsets)):
        rows = [x[:, a:b].numpy() for x in (call.r, call.k, call.v, call.w)]
        start = call.initial_state[call.state_map[m] : call.state_map[m] + 1].numpy()
        expected_y, expected_state = oracle.wkv(*rows, call.u.numpy(), start)
        np.testing.assert_allclose(y[:, a:b], expected_y, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(state[m : m + 1], expected_state, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SAMPLES)
def test_backward_equals_autograd(name):
    call = sample_inputs(torch.float64)[name].double().leaves()
    grad_y, grad_state = call.grad_outputs()
    y, state = reference.wkv(*call.args())
    expected = torch.autograd.grad(
        (y, state), call.differentiable(), (grad_y, grad_state), materialize_grads=True
    )
    found = reference.wkv_backward(grad_y, grad_state, *call.double().args())
    for a, b in zip(found, expected, strict=False):
        assert relative_rms(a, b) < 1e-12
    assert (found[5].numel() == 0) == (call.initial_state is None)


@pytest.mark.parametrize("decays", SLOW_DECAYS)
def test_slow_decays_in_float32(decays):
    call = slow_call(decays)
    grads = call.grad_outputs()
    double = call.double().args()
    found = (*reference.wkv(*call.args()), *reference.wkv_backward(*grads, *call.args()))
    grads = [x.double() for x in grads]
    expected = (*reference.wkv(*double), *reference.wkv_backward(*grads, *double))
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(a, b) <= 2e-6


def test_infinite_decays_have_finite_derivatives():
    call = random_call(T=4, dtype=torch.float64)
    call.w[:, 1] = torch.inf
    call.w[:, 2] = -torch.inf
    call = call.leaves()
    y, state = reference.wkv(*call.args())
    grads = torch.autograd.grad(y.sum() + state.sum(), call.differentiable())
    assert all(x.isfinite().all() for x in (y, state, *grads))
