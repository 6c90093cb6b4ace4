"""RWKVKernelOperator and get_rwkv6_kernel: the interface of the operators they follow."""

import threading

import keras
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
)
from samples import flat, random_inputs

from keras_adapter import RWKVKernelOperator, get_rwkv6_kernel, ops

B, T, H, N = 3, 21, 2, 8


def flat_inputs(**options):
    """r, k, v, w as (B, T, C) tensors, u (H, N), perhaps states; and the arrays behind them."""
    x = random_inputs(B, T, H, N, **options)
    return [tensor(flat(a)) for a in x[:4]] + [tensor(a) for a in x[4:]], x


def assert_right(found, expected):
    y, state = found
    assert relative_rms(array(y), flat(expected[0])) < 1e-6
    if state is not None:
        assert relative_rms(array(state), expected[1]) < 1e-6


@pytest.mark.parametrize("ops_loop", [False, True])
def test_without_state(ops_loop):
    given, x = flat_inputs()
    y, state = RWKVKernelOperator(N, 4096, ops_loop)(*given)
    assert state is None
    assert_right((y, None), recurrence.wkv(*x))


@pytest.mark.parametrize("with_state", [False, True])
def test_init_state_is_used_with_and_without_with_state(with_state):
    given, x = flat_inputs(states=B)
    found = RWKVKernelOperator(N)(*given[:5], with_state=with_state, init_state=given[5])
    assert (found[1] is not None) == with_state
    assert_right(found, recurrence.wkv(*x))


def test_one_state_of_three_dimensions():
    given, x = flat_inputs(states=1)
    found = RWKVKernelOperator(N)(*given[:5], True, tensor(x[5][0]))
    assert_right(found, recurrence.wkv(*x))


@pytest.mark.parametrize("as_list", [False, True])
def test_state_map(as_list):
    given, x = flat_inputs(states=2)
    state_map = [1, 0, 1] if as_list else tensor(np.array([1, 0, 1], "int32"))
    found = RWKVKernelOperator(N)(*given[:5], True, given[5], state_map)
    assert_right(found, recurrence.wkv(*x, state_map=[1, 0, 1]))


def test_a_flat_u():
    given, x = flat_inputs()
    found = RWKVKernelOperator(N)(*given[:4], tensor(x[4].reshape(-1)), with_state=True)
    assert_right(found, recurrence.wkv(*x))


@pytest.mark.parametrize("shape", [(1, H * N), (1, H, N), (1, 1, H * N), (H * N, 1)])
def test_u_of_any_shape_with_as_many_elements(shape):
    given, x = flat_inputs()
    found = RWKVKernelOperator(N)(*given[:4], tensor(x[4].reshape(shape)), with_state=True)
    assert_right(found, recurrence.wkv(*x))


@pytest.mark.parametrize("high_level", [None, False, True])
def test_high_level(high_level):
    given, x = flat_inputs(states=B)
    operator = RWKVKernelOperator(N, high_level=high_level)
    f = quick(lambda *a: operator(*a[:5], True, a[5]))
    assert_right(f(*given), recurrence.wkv(*x))
    again = RWKVKernelOperator.from_config(operator.get_config())
    assert again.high_level is high_level


def test_high_level_chooses_what_computes(monkeypatch):
    """True is keras.ops, False is what the backend has, None is what OPS_KERNEL says."""
    from keras_adapter import backends

    calls = []
    monkeypatch.setattr(backends.chunked, "wkv", lambda *x: calls.append("keras.ops"))
    monkeypatch.setattr(backends, "_found", (lambda *x: calls.append("native"), True))
    assert backends.choose(True) is not backends.choose(False)
    for setting in ("0", "1"):
        monkeypatch.setattr(backends, "_SETTING", setting)
        for high_level in (True, False, None):
            backends.choose(high_level)(*(None,) * 7)
    assert calls == ["keras.ops", "native", "native", "keras.ops", "native", "keras.ops"]


def test_max_sequence_length_bounds_nothing():
    given, x = flat_inputs()
    assert_right(RWKVKernelOperator(N, max_sequence_length=4)(*given), recurrence.wkv(*x))


@pytest.mark.parametrize("ops_loop", [False, True])
def test_one_token_at_a_time(ops_loop):
    given, x = flat_inputs(states=B)
    operator, state, ys = RWKVKernelOperator(N, ops_loop=ops_loop), given[5], []
    for t in range(T):
        piece = [tensor(flat(a[:, t : t + 1])) for a in x[:4]]
        y, state = operator(*piece, given[4], with_state=True, init_state=state)
        ys.append(array(y))
    y, expected_state = recurrence.wkv(*x)
    assert relative_rms(np.concatenate(ys, 1), flat(y)) < 1e-6
    assert relative_rms(array(state), expected_state) < 1e-6


@pytest.mark.skipif(not DIFFERENTIABLE, reason="no gradients on this backend")
@pytest.mark.parametrize("state_map", [None, [1, 0, 1]])
@pytest.mark.parametrize("with_state", [False, True])
def test_gradients(with_state, state_map):
    """Of every input, a flat u and the states, whatever with_state is, through state_map too."""
    states = B if state_map is None else 2
    given, x = flat_inputs(states=states)
    given[4] = tensor(x[4].reshape(-1))
    index = None if state_map is None else tensor(np.array(state_map, "int32"))
    operator = RWKVKernelOperator(N)

    def f(*a):
        y, state = operator(*a[:5], with_state, a[5], index)
        return (y, state) if with_state else (y,)

    g = np.random.default_rng(2)
    grads = [g.standard_normal((B, T, H, N)), g.standard_normal((B, H, N, N)) * with_state]
    grads = [a.astype("float32") for a in grads]
    sent = [tensor(flat(grads[0])), tensor(grads[1])][: 1 + with_state]
    _, found = gradients(f, given, sent)
    expected = recurrence.gradients(*grads, *x, state_map=state_map)
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(array(a), b.reshape(array(a).shape)) < 5e-6


def test_compiled():
    given, x = flat_inputs(states=B)
    operator = RWKVKernelOperator(N)
    f = compiled(lambda *a: operator(*a[:5], with_state=True, init_state=a[5]))
    assert_right(f(*given), recurrence.wkv(*x))


@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("length", [5, None])
def test_symbolic(batch, length):
    tokens = [keras.KerasTensor((batch, length, H * N), dtype="bfloat16") for _ in range(4)]
    u = keras.KerasTensor((H, N), dtype="float32")
    y, state = RWKVKernelOperator(N)(*tokens, u, with_state=True)
    assert (y.shape, y.dtype) == ((batch, length, H * N), "bfloat16")
    assert (state.shape, state.dtype) == ((batch, H, N, N), "float32")
    y, state = RWKVKernelOperator(N)(*tokens, u)
    assert state is None
    heads = [keras.KerasTensor((batch, length, H, N)) for _ in range(4)]
    states, index = keras.KerasTensor((7, H, N, N)), keras.KerasTensor((batch,), dtype="int32")
    y, state = ops.wkv(*heads, u, states, state_map=index)
    assert (y.shape, state.shape) == ((batch, length, H, N), (batch, H, N, N))
    with pytest.raises(ValueError, match="k: expected"):
        ops.wkv(heads[0], keras.KerasTensor((batch, length, H, N + 1)), *heads[2:], u)


SYMBOLIC = dict.fromkeys("rkvw", (2, None, H * N)) | {"u": (H, N)}
BAD_SYMBOLIC = {
    "width of k": ({"k": (2, None, N)}, r"k: expected the shape of r, \(B, T, 16\), got shape"),
    "width of w": ({"w": (2, None, 2 * H * N)}, r"w: expected the shape of r"),
    "dimensions of v": ({"v": (2, None, H, N)}, r"v: expected the shape of r"),
    "batch of v": ({"v": (3, None, H * N)}, r"v: expected the shape of r"),
    "dimensions of r": ({"r": (2, H * N)}, r"r: expected 3 dimensions \(B, T, C\)"),
    "width of r": ({"r": (2, None, H * N + 1)}, "r: expected a width C that head_size = 8 divides"),
    "width of r not known": ({"r": (2, None, None)}, "r: expected a width C"),
    "u": ({"u": (H, N + 1)}, r"u: expected \[H, N\]"),
    "u turned round": ({"u": (N, H)}, r"u: expected \[H, N\]"),
    "states": ({"init_state": (2, H, N)}, r"initial_state: expected \[S, H, N, N\]"),
    "number of states": ({"init_state": (3, H, N, N)}, "initial_state: 3 states for 2 sequences"),
    "map alone": ({"state_map": (2,)}, "state_map: given without"),
    "map's length": (
        {"init_state": (3, H, N, N), "state_map": (3,)},
        r"state_map: expected \[B\] = \(2,\)",
    ),
}


@pytest.mark.parametrize("case", BAD_SYMBOLIC)
def test_a_symbolic_call_checks_what_a_call_does(case):
    change, message = BAD_SYMBOLIC[case]
    given = {
        name: keras.KerasTensor(shape, dtype="int32" if name == "state_map" else "float32")
        for name, shape in (SYMBOLIC | change).items()
    }
    with pytest.raises(ValueError, match=message):
        RWKVKernelOperator(N)(**given)
    if "state_map" in given:
        given["state_map"] = [0] * change["state_map"][0]
        with pytest.raises(ValueError, match=message):
            RWKVKernelOperator(N)(**given)


def test_a_symbolic_call_checks_dtypes_and_entries():
    given = {name: keras.KerasTensor(shape) for name, shape in SYMBOLIC.items()}
    states = keras.KerasTensor((3, H, N, N))
    operator = RWKVKernelOperator(N)
    with pytest.raises(TypeError, match="k: expected float32 beside r of float32, got float16"):
        operator(**given | {"k": keras.KerasTensor((2, None, H * N), dtype="float16")})
    with pytest.raises(ValueError, match=r"state_map: expected entries from 0 to 2 \(3 states\)"):
        operator(**given, init_state=states, state_map=[0, 3])
    with pytest.raises(TypeError, match=r"state_map: expected integers, got 0\.5 among them"):
        operator(**given, init_state=states, state_map=[0, 0.5])
    with pytest.raises(TypeError, match="with_state: expected True or False"):
        operator(**given, with_state=states)


@pytest.mark.skipif(BACKEND == "numpy", reason="keras has no such models on numpy")
def test_a_functional_model_is_saved_and_loaded(tmp_path):
    inputs = [keras.Input((None, H * N), name=name) for name in "rkvw"]
    u = keras.Input((N,), batch_size=H, name="u")
    model = keras.Model([*inputs, u], RWKVKernelOperator(N, 64)(*inputs, u, with_state=True))
    model.save(tmp_path / "operator.keras")
    loaded = keras.saving.load_model(tmp_path / "operator.keras")
    given, x = flat_inputs()
    assert_right(loaded(given), recurrence.wkv(*x))
    heads = [keras.Input((None, H, N)) for _ in range(4)]
    model = keras.Model([*heads, u], ops.wkv(*heads, u))
    model.save(tmp_path / "function.keras")
    y, _ = keras.saving.load_model(tmp_path / "function.keras")([tensor(a) for a in x])
    assert relative_rms(array(y), recurrence.wkv(*x)[0]) < 1e-6


def test_config():
    operator = RWKVKernelOperator(N, 64, ops_loop=True, name="wkv")
    config = keras.saving.serialize_keras_object(operator)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == operator.get_config()
    assert again.get_config()["max_sequence_length"] == 64


def test_threads_share_an_operator():
    operator = RWKVKernelOperator(N)
    cases = [flat_inputs(seed=i) if i % 2 else flat_inputs(seed=i, states=B) for i in range(8)]
    found = [None] * len(cases)

    def run(i):
        given = cases[i][0]
        found[i] = operator(*given[:5], with_state=True, init_state=(*given, None)[5])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (_, x), result in zip(cases, found):
        assert_right(result, recurrence.wkv(*x))


def test_bad_input():
    given, _ = flat_inputs()
    with pytest.raises(ValueError, match="head_size: expected 1 to 256, got 0"):
        RWKVKernelOperator(0)
    for size in ("64", 4.5, 64.0, True, None, [64]):
        with pytest.raises(TypeError, match="head_size: expected an int, got"):
            RWKVKernelOperator(size)
        with pytest.raises(TypeError, match="head_size: expected an int, got"):
            get_rwkv6_kernel(size)
    with pytest.raises(TypeError, match="max_sequence_length: expected an int, got 'long'"):
        RWKVKernelOperator(N, "long")
    with pytest.raises(ValueError, match="max_sequence_length: expected at least 1, got -1"):
        RWKVKernelOperator(N, -1)
    with pytest.raises(TypeError, match="ops_loop: expected True or False, got 'no'"):
        RWKVKernelOperator(N, ops_loop="no")
    with pytest.raises(TypeError, match="high_level: expected True or False, got 1"):
        RWKVKernelOperator(N, high_level=1)
    operator = RWKVKernelOperator(np.int64(N))
    with pytest.raises(TypeError, match="with_state: expected True or False, got"):
        operator(*given, tensor(np.zeros((1, H, N, N), "float32")))
    with pytest.raises(TypeError, match="output_final_state: expected True or False, got"):
        get_rwkv6_kernel(N)(*given, output_final_state="yes")
    for place, name in enumerate("rkvwu"):
        for wrong in (None, "text", {}):
            with pytest.raises(TypeError, match=f"{name}: expected a tensor, got"):
                operator(*given[:place], wrong, *given[place + 1 :])
    operator = RWKVKernelOperator(N + 1)
    with pytest.raises(ValueError, match="head_size = 9 divides, got 16"):
        operator(*given)
    operator = RWKVKernelOperator(N)
    with pytest.raises(ValueError, match=r"r: expected 3 dimensions \(B, T, C\)"):
        operator(given[0][0], *given[1:])
    with pytest.raises(ValueError, match=r"w: expected the shape of r, \(B, T, 16\)"):
        operator(*given[:3], given[3][..., :8], given[4])
    with pytest.raises(ValueError, match=r"u: expected \[H, N\]"):
        operator(*given[:4], given[4][:, :4])


@pytest.mark.parametrize("kernel_type", ["native", "cuda", "triton"])
def test_get_rwkv6_kernel(kernel_type):
    op = get_rwkv6_kernel(HEAD_SIZE=N, KERNEL_TYPE=kernel_type, MAX_SEQUENCE_LENGTH=4)
    given, x = flat_inputs(states=2)
    y = op(*given[:5], initial_state=given[5], state_map=[1, 0, 1])
    expected = recurrence.wkv(*x, state_map=[1, 0, 1])
    assert_right((y, None), expected)
    found = op(*given[:5], initial_state=given[5], output_final_state=True, state_map=[1, 0, 1])
    assert_right(found, expected)


def test_get_rwkv6_kernel_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="KERNEL_TYPE: expected one of native, cuda, triton, got"):
        get_rwkv6_kernel(64, "metal")
