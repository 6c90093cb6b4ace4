"""Where rwkv6-keras-operator 1.0.5 and rwkv-ops 0.11.3 fail: a test for each, by name.

(That kernels are compiled at import: test_environment.py, test_tensorflow_graphs.py and
test_torch_compile.py import ours where no compiler is found.
Launches on the wrong CUDA stream or device are left: there is no CUDA kernel here yet.)
"""

import keras
import numpy as np
import pytest
import recurrence
from backend import BACKEND, DIFFERENTIABLE, array, compiled, gradients, relative_rms, tensor
from samples import cast, flat, random_inputs

from keras_adapter import RWKVKernelOperator

B, T, H, N = 2, 12, 2, 8
pytestmark = pytest.mark.skipif(not DIFFERENTIABLE, reason="no gradients on this backend")


def case(T=T, N=N, *, flat_u=False, **options):
    """Arguments of the operator, and of the recurrence."""
    x = random_inputs(B, T, H, N, extreme=False, **options)
    given = [tensor(flat(a)) for a in x[:4]] + [tensor(a) for a in x[4:]]
    if flat_u:
        given[4] = tensor(x[4].reshape(-1))
    return given, x


def check_gradients(T=T, N=N, *, flat_u=False, state_map=None, states=B, operator=None, **call):
    """Of y alone, for all inputs, against the recurrence."""
    given, x = case(T, N, flat_u=flat_u, states=states)
    index = None if state_map is None else tensor(np.array(state_map, "int32"))
    operator = operator or RWKVKernelOperator(N, T)
    grad_y = np.random.default_rng(3).standard_normal((B, T, H, N)).astype("float32")

    def f(*a):
        return (operator(*a[:5], init_state=a[5], state_map=index, **call)[0],)

    (y,), found = gradients(f, given, [tensor(flat(grad_y))])
    zeros = np.zeros((B, H, N, N))
    expected = recurrence.gradients(grad_y, zeros, *x, state_map=state_map)
    assert relative_rms(array(y), flat(recurrence.wkv(*x, state_map=state_map)[0])) < 1e-6
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(array(a), b.reshape(array(a).shape)) < 5e-6


def test_state_map_crashes():
    check_gradients(state_map=[2, 0], states=3, with_state=True)


def test_init_state_without_with_state_is_ignored():
    given, x = case(states=B)
    y, state = RWKVKernelOperator(N, T)(*given[:5], with_state=False, init_state=given[5])
    assert state is None
    assert relative_rms(array(y), flat(recurrence.wkv(*x)[0])) < 1e-6


def test_with_state_detaches_y():
    check_gradients(with_state=True)


def test_init_state_gets_no_gradient():
    check_gradients(states=1)


def test_a_flat_u_breaks_backward():
    check_gradients(flat_u=True)


def test_jax_gradients_fail_and_tensorflow_has_none():
    check_gradients()


def test_longer_than_max_sequence_length_writes_out_of_bounds():
    check_gradients(T=40, operator=RWKVKernelOperator(N, 8))


def test_training_on_one_token_writes_out_of_bounds():
    for ops_loop in (False, True):
        check_gradients(T=1, operator=RWKVKernelOperator(N, 8, ops_loop=ops_loop))


def test_a_second_head_size_or_length_aborts_the_process():
    first, second = RWKVKernelOperator(8, 16), RWKVKernelOperator(4, 64)
    for operator, size, length in ((first, 8, 5), (second, 4, 20), (first, 8, 33)):
        check_gradients(T=length, N=size, operator=operator)


def test_compilers_fail():
    operator = RWKVKernelOperator(N)
    given, x = case(states=B)
    f = compiled(lambda *a: operator(*a[:5], with_state=True, init_state=a[5]))
    assert relative_rms(array(f(*given)[0]), flat(recurrence.wkv(*x)[0])) < 1e-6


def test_vmap_fails():
    operator = RWKVKernelOperator(N)
    cases = [case(seed=seed) for seed in range(2)]
    stacked = [keras.ops.stack(a) for a in zip(*(given for given, _ in cases))]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        found = tf.vectorized_map(lambda a: operator(*a)[0], stacked)
    else:
        vmap = __import__(BACKEND).vmap
        found = vmap(lambda *a: operator(*a)[0])(*stacked)
    for y, (_, x) in zip(array(found), cases):
        assert relative_rms(y, flat(recurrence.wkv(*x)[0])) < 1e-6


def test_double_backward_fails():
    """d/de of g(x + e d) . d equals the difference of gradients, for g the gradient of sum(y^3)."""
    operator = RWKVKernelOperator(N)
    given, _ = case(T=4)
    direction = [tensor(a) for a in map(array, case(T=4, seed=5)[0])]

    def of_r(r):  # the gradient of r, as a function that can be differentiated
        def loss(r):
            return keras.ops.sum(operator(r, *given[1:])[0] ** 3)

        if BACKEND == "jax":
            import jax

            return jax.grad(loss)(r)
        if BACKEND == "torch":
            import torch

            return torch.autograd.grad(loss(r), r, create_graph=True)[0]
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(r)
            value = loss(r)
        return tape.gradient(value, r)

    _, (found,) = gradients(lambda r: (of_r(r),), given[:1], direction[:1])

    def at(step):
        r = tensor(array(given[0]) + step * array(direction[0]))
        if BACKEND == "torch":
            r.requires_grad_()
        return array(of_r(r).detach() if BACKEND == "torch" else of_r(r)).astype("float64")

    step = 1e-2  # the gradient is quadratic in r: central differences have no error but rounding
    assert relative_rms(array(found), (at(step) - at(-step)) / (2 * step)) < 1e-3


def test_a_bfloat16_state_is_rounded_at_every_hand_over():
    x = random_inputs(1, 64, H, N, states=1, extreme=False)
    x = [cast(a, "bfloat16") for a in x[:5]] + x[5:]
    state = tensor(x[5])
    for t in range(64):
        piece = [tensor(flat(a[:, t : t + 1])) for a in x[:4]]
        _, state = RWKVKernelOperator(N)(*piece, tensor(x[4]), True, state)
    assert keras.backend.standardize_dtype(state.dtype) == "float32"
    assert relative_rms(array(state), recurrence.wkv(*x)[1]) < 1e-6
