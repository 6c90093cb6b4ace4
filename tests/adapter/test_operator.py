"""RWKVKernelOperator and get_rwkv6_kernel: the interface of the operators they follow."""

import threading

import keras
import numpy as np
import pytest
import recurrence
from backend import BACKEND, DIFFERENTIABLE, array, compiled, gradients, relative_rms, tensor
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
