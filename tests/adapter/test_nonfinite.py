"""keras.ops: a NaN or an infinity goes where the recurrence takes it, forward and backward.

The oracle is the recurrence in float64: what is not finite there, and nothing else, may not be
finite here.
"""

import functools

import numpy as np
import pytest
import recurrence
from backend import DIFFERENTIABLE, array, gradients, quick, tensor
from samples import random_grads, random_inputs

from keras_adapter.ops import wkv

T = 45  # a chunk, and a part of another
NAMES = ("r", "k", "v", "w", "u", "initial_state", "grad_y", "grad_final_state")
OUTPUTS = ("y", "final_state", *(f"gradient of {name}" for name in NAMES[:6]))
high_level = functools.partial(wkv, high_level=True)


def assert_not_finite_where_it_should(x, grads):
    with np.errstate(all="ignore"):
        expected = recurrence.wkv(*x)
        if DIFFERENTIABLE:
            expected = (*expected, *recurrence.gradients(*grads, *x))
    tensors = [tensor(a) for a in x]
    if DIFFERENTIABLE:
        outputs, found = gradients(high_level, tensors, [tensor(g) for g in grads])
        found = (*outputs, *found)
    else:
        found = quick(high_level)(*tensors)
    for name, a, b in zip(OUTPUTS, found, expected):
        a, b = np.isfinite(array(a)), np.isfinite(b)
        assert np.array_equal(a, b), f"{name}: {np.argwhere(a != b)[:4].tolist()}"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_not_finite(name, value):
    if name.startswith("grad") and not DIFFERENTIABLE:
        pytest.skip("no gradients on this backend")
    x, grads = random_inputs(2, T, 2, 4, states=2), random_grads(2, T, 2, 4)
    bad = dict(zip(NAMES, (*x, *grads)))[name]
    if name in ("r", "k", "v", "w", "grad_y"):  # early in one sequence, last of all in another
        bad[0, 3, 0, 1] = bad[1, T - 1, 1, 2] = value
    elif name == "u":
        bad[1, 2] = value
    else:
        bad[1, 0, 2, 3] = value
    assert_not_finite_where_it_should(x, grads)


@pytest.mark.parametrize("name", ["r", "k", "v", "w"])
def test_a_single_token(name):
    x, grads = random_inputs(2, 1, 2, 4, states=2), random_grads(2, 1, 2, 4)
    dict(zip(NAMES, x))[name][1, 0, 1, 2] = np.nan
    assert_not_finite_where_it_should(x, grads)


def test_products_that_overflow():
    """k times v is infinite at one token; the recurrence in float32 says what it reaches."""
    x = random_inputs(1, T, 1, 4, extreme=False)
    x[1][0, 7, 0, 1] = x[2][0, 7, 0, 2] = 3e30
    y, state = (array(a) for a in quick(high_level)(*map(tensor, x)))
    reached = np.zeros(y.shape, bool)
    reached[0, 7:, 0, 2] = True
    assert np.array_equal(~np.isfinite(y), reached)
    assert np.array_equal(np.argwhere(~np.isfinite(state)), [[0, 0, 1, 2]])
