"""keras_adapter.ops.wkv against the float64 recurrence: both implementations, both directions."""

import functools

import ml_dtypes
import numpy as np
import pytest
import recurrence
from backend import (
    BACKEND,
    DIFFERENTIABLE,
    array,
    compiled,
    gradients,
    quick,
    relative_rms,
    tensor,
    traced,
)
from samples import random_grads, random_inputs

import keras_adapter
from keras_adapter.ops import wkv

DOUBLE = BACKEND in ("torch", "tensorflow")
FORWARD = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 2.5e-3, "float16": 3.5e-4}
BACKWARD = {"float64": 1e-13, "float32": 5e-6, "bfloat16": 2.5e-3, "float16": 4.5e-4}
HIGH_LEVEL = [False, True] if keras_adapter.has_kernels else [True]
IMPLEMENTATIONS = pytest.mark.parametrize("high_level", HIGH_LEVEL)
STATES = {  # how many, and the state map
    "no state": (None, None),
    "shared state": (1, None),
    "a state each": (3, None),
    "state map": (4, (2, 0, 2)),
    "fewer states than sequences": (2, (1, 1, 0)),
}


@functools.cache  # so that what is compiled for it is compiled once
def operator(high_level, state_map=None):
    index = tensor(np.array(state_map, "int32")) if state_map else None
    return lambda *a: wkv(*a, state_map=index, high_level=high_level)


def check(x, state_map=None, *, high_level, wrap=lambda f: f):
    """Outputs and, where the backend has them, gradients of all inputs."""
    dtype = str(x[0].dtype)
    double_as_single = high_level and BACKEND != "tensorflow"  # as keras.ops has it

    def bound(bounds, a):
        single = double_as_single and a.dtype == "float64"
        return bounds["float32" if single else str(a.dtype)]

    f = wrap(operator(high_level, state_map))
    expected = recurrence.wkv(*x, state_map=state_map)
    tensors = [tensor(a) for a in x]
    acc = "float64" if dtype == "float64" else "float32"
    if not DIFFERENTIABLE:
        found = [array(a) for a in f(*tensors)]
    else:
        grads = random_grads(*x[0].shape, dtype)
        outputs, found_grads = gradients(f, tensors, [tensor(g) for g in grads])
        found = [array(a) for a in outputs]
        expected_grads = recurrence.gradients(*grads, *x, state_map=state_map)
        for name, a, b, given in zip("rkvwus", found_grads, expected_grads, x):
            a = array(a)
            assert a.dtype == given.dtype, name
            assert a.shape == given.shape, name
            assert relative_rms(a, b) <= bound(BACKWARD, a), f"gradient of {name}"
    for name, a, b in zip(("y", "state"), found, expected):
        assert str(a.dtype) == (dtype if name == "y" else acc)
        assert a.shape == b.shape
        assert relative_rms(a, b) <= bound(FORWARD, a), name


# Lengths around the chunks' and dtypes, head sizes and states, which do not know of each other:
# each value of each, in one process.
@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("T", "N", "dtype", "states"),
    [
        (0, 8, "float32", "a state each"),
        (1, 1, "float32", "no state"),
        (1, 8, "bfloat16", "a state each"),
        (31, 3, "float16", "shared state"),
        (32, 64, "float32", "state map"),
        (33, 8, "bfloat16", "fewer states than sequences"),
        (40, 16, "float64", "state map"),
        (40, 96, "float32", "no state"),
        (200, 8, "float32", "a state each"),
    ],
)
def test_lengths_sizes_dtypes_and_states(T, N, dtype, states, high_level):
    if dtype == "float64" and not DOUBLE:
        pytest.skip("test_jax_transforms.py has float64; keras makes float32 of NumPy's")
    count, state_map = STATES[states]
    check(random_inputs(3, T, 2, N, dtype, states=count), state_map, high_level=high_level)


@IMPLEMENTATIONS
def test_a_length_that_takes_the_loop(high_level):
    check(random_inputs(1, 1100, 1, 4, states=1), high_level=high_level)


@IMPLEMENTATIONS
def test_w_and_u_in_float32_beside_half_precision(high_level):
    r, k, v, w, u = random_inputs(2, 20, 2, 8, "bfloat16", w_dtype="float32")
    check([r, k, v, w, u.astype("float32")], high_level=high_level)


@pytest.mark.skipif(BACKEND == "jax", reason="all that check() runs there is compiled")
@pytest.mark.skipif(BACKEND == "tensorflow", reason="test_tensorflow_graphs.py has it")
@IMPLEMENTATIONS
def test_compiled(high_level):
    check(random_inputs(2, 33, 2, 8, states=2), high_level=high_level, wrap=compiled)


@pytest.mark.parametrize("w", ["-9 to -5", "-9"])
def test_slow_decays(w):
    """keras.ops: each decay is close to 1 and rounded, which must not add up over the tokens."""
    T, N = 4096, 16
    x = random_inputs(1, T, 1, N, states=1, extreme=False)
    x[3][:] = -9 if w == "-9" else np.random.default_rng(2).uniform(-9, -5, x[3].shape)
    f, tensors, grads = operator(True), [tensor(a) for a in x], random_grads(1, T, 1, N)
    expected = recurrence.wkv(*x)
    if DIFFERENTIABLE:
        found, found_grads = gradients(f, tensors, [tensor(g) for g in grads])
        found, expected = (*found, *found_grads), (*expected, *recurrence.gradients(*grads, *x))
    else:
        found = f(*tensors)
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(array(a), b) <= 2e-6


@pytest.mark.parametrize("tokens", [1, 5])
def test_slow_decays_in_pieces(tokens):
    """keras.ops, decoding: the state is handed over hundreds of times."""
    x = random_inputs(1, 300 * tokens, 1, 4, states=1, extreme=False)
    x[3][:] = -9
    x[1][:, tokens:] = 0  # what the state was decays, and nothing is added that would hide it
    f, state = traced(operator(True)), tensor(x[5])
    for t in range(0, 300 * tokens, tokens):
        _, state = f(*(tensor(a[:, t : t + tokens]) for a in x[:4]), tensor(x[4]), state)
    assert relative_rms(array(state), recurrence.wkv(*x)[1]) <= 2e-6


@IMPLEMENTATIONS
@pytest.mark.parametrize("value", [-np.inf, -1e9, 80.0, 90.0, 1e9, np.inf])
def test_any_decay_is_finite(value, high_level):
    x = random_inputs(1, 40, 1, 4, extreme=False, states=1)
    x[3][:, ::3] = value
    check(x, high_level=high_level)


@IMPLEMENTATIONS
def test_padding_leaves_the_state(high_level):
    r, k, v, w, u, state = random_inputs(2, 40, 2, 8, states=2)
    k[:], v[:], w[:] = 0, 0, -1e9
    f = quick(operator(high_level))
    _, final = f(*(tensor(x) for x in (r, k, v, w, u, state)))
    np.testing.assert_array_equal(array(final), state)

    # after real tokens, and with finite gradients
    x = random_inputs(2, 40, 2, 8, states=2)
    for a, pad in zip(x[1:4], (0, 0, -1e9)):
        a[:, 23:] = pad
    check(x, high_level=high_level)
    short = [a[:, :23] for a in x[:4]] + x[4:]
    long_state, short_state = (array(f(*map(tensor, a))[1]) for a in (x, short))
    np.testing.assert_allclose(long_state, short_state, rtol=1e-5, atol=1e-6)


@IMPLEMENTATIONS
def test_a_state_handed_over_is_not_rounded(high_level):
    """bfloat16 tokens in pieces end in the state of the whole, in float32."""
    x = random_inputs(1, 64, 1, 8, "bfloat16", states=1, extreme=False)
    state = tensor(x[5])
    for t in range(64):
        piece = [tensor(a[:, t : t + 1]) for a in x[:4]]
        _, state = quick(operator(high_level))(*piece, tensor(x[4]), state)
    assert relative_rms(array(state), recurrence.wkv(*x)[1]) < 1e-6


@IMPLEMENTATIONS
def test_a_traced_state_map_out_of_range(high_level):
    """A runtime error of the native call, or NaN for that sequence alone."""
    if BACKEND == "numpy":
        pytest.skip("nothing is traced")
    x = random_inputs(2, 5, 1, 4, states=2)
    tensors = [tensor(a) for a in x]
    f = compiled(lambda m: wkv(*tensors, state_map=m, high_level=high_level))
    good = array(f(tensor(np.array([1, 0], "int32")))[0])
    assert relative_rms(good, recurrence.wkv(*x, state_map=[1, 0])[0]) < 1e-6
    for bad in ([1, 2], [1, -1], [1, 1 << 30]):
        try:
            y, state = (array(a) for a in f(tensor(np.array(bad, "int32"))))
        except Exception as error:
            if high_level or "state_map" not in str(error):
                raise
        else:
            np.testing.assert_allclose(y[0], good[0], rtol=1e-5, atol=1e-6)
            assert np.isnan(y[1]).all()
            assert np.isnan(state[1]).all()


def float32(*shape):
    return np.zeros(shape, "float32")


RKVW = {name: float32(2, 3, 2, 4) for name in "rkvw"} | {"u": float32(2, 4)}
BAD = {
    "r of three dimensions": ({"r": float32(2, 3, 8)}, ValueError, r"r: expected 4 dimensions"),
    "r of int": ({"r": np.zeros((2, 3, 2, 4), "int32")}, TypeError, "r: expected float64 or"),
    "head size": (
        {n: float32(1, 1, 1, 300) for n in "rkvw"} | {"u": float32(1, 300)},
        ValueError,
        "r: expected a head size N from 1 to 256, got 300",
    ),
    "no heads": (
        {n: float32(1, 1, 0, 4) for n in "rkvw"} | {"u": float32(0, 4)},
        ValueError,
        "r: expected a number of heads H from 1",
    ),
    "k's shape": ({"k": float32(2, 4, 2, 4)}, ValueError, r"k: expected the shape of r = \(2, 3"),
    "v's dtype": (
        {"v": RKVW["v"].astype(ml_dtypes.bfloat16)},
        TypeError,
        "v: expected float32 beside r of float32, got bfloat16",
    ),
    "w's dtype": ({"w": RKVW["w"].astype("float16")}, TypeError, "w: expected float32 beside r"),
    "u's shape": ({"u": float32(4, 2)}, ValueError, r"u: expected \[H, N\] = \(2, 4\), got"),
    "state's shape": (
        {"initial_state": float32(2, 2, 4)},
        ValueError,
        r"initial_state: expected \[S, H, N, N\] = \(None, 2, 4, 4\), got shape \(2, 2, 4\)",
    ),
    "states without map": (
        {"initial_state": float32(3, 2, 4, 4)},
        ValueError,
        "initial_state: 3 states for 2 sequences need a state_map",
    ),
    "map without states": ({"state_map": [0, 0]}, ValueError, "state_map: given without"),
    "map's length": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": [0, 1, 1]},
        ValueError,
        r"state_map: expected \[B\] = \(2,\), got shape \(3,\)",
    ),
    "map's dtype": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": float32(2)},
        TypeError,
        "state_map: expected int32 or int64, got float32",
    ),
    "map's values": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": [0, 2]},
        ValueError,
        r"state_map: expected entries from 0 to 1 \(2 states\), got \[2\]",
    ),
    "an entry that 32 bits would make 1": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": [0, 2**32 + 1]},
        ValueError,
        r"state_map: expected entries from 0 to 1 \(2 states\), got \[4294967297\]",
    ),
    "such an entry in an array": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": np.array([0, 2**32 + 1])},
        ValueError,
        r"state_map: expected entries from 0 to 1 \(2 states\), got \[4294967297\]",
    ),
    "an entry of more than 64 bits": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": [0, 2**64]},
        ValueError,
        "state_map: expected integers of 64 bits",
    ),
    "many wrong entries": (
        {n: float32(100, 1, 1, 1) for n in "rkvw"}
        | {"u": float32(1, 1), "initial_state": float32(2, 1, 1, 1), "state_map": [7] * 100},
        ValueError,
        r"got \[7, 7, 7, 7, 7, 7, 7, 7, \.\.\.\]$",
    ),
    "floats in the map": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": [0.7, 1.2]},
        TypeError,
        "state_map: expected integers, got 0.7 among them",
    ),
    "bools in the map": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": [True, False]},
        TypeError,
        "state_map: expected integers, got True among them",
    ),
    "a bool map": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": np.array([True, False])},
        TypeError,
        "state_map: expected int32 or int64, got bool",
    ),
    "no tensor": ({"k": None}, TypeError, "k: expected a tensor, got None"),
    "a string": ({"v": "v"}, TypeError, "v: expected a tensor, got 'v'"),
    "a mapping": ({"u": {}}, TypeError, r"u: expected a tensor, got \{\}"),
    "a string as state": ({"initial_state": "s"}, TypeError, "initial_state: expected a tensor"),
    "high_level": ({"high_level": 1}, TypeError, "high_level: expected True or False, got 1"),
    "an axis of no mesh": ({"axis_name": "tokens"}, ValueError, "axis_name: expected .*'tokens'"),
    "a negative entry": (
        {"initial_state": float32(2, 2, 4, 4), "state_map": [-1, 0]},
        ValueError,
        "state_map: expected entries from 0 to 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    change, error, message = BAD[case]
    given = RKVW | change
    for name, x in given.items():  # state_map as it is: NumPy's is taken, too
        if isinstance(x, np.ndarray) and name != "state_map":
            given[name] = tensor(x)
    with pytest.raises(error, match=message):
        wkv(**given)
