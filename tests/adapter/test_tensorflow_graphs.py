"""TensorFlow graphs: unknown sizes, SavedModel, compile time, and the native path's equality."""

import numpy as np
import pytest
import recurrence
import tensorflow as tf
from backend import relative_rms
from new_process import run
from samples import flat, random_inputs

import keras_adapter
from keras_adapter import RWKVKernelOperator, ops
from keras_adapter.backends import chunked
from keras_adapter.backends import tensorflow as backend

H, N = 2, 8
SIGNATURE = [tf.TensorSpec((None, None, H, N), tf.float32)] * 4
SIGNATURE += [tf.TensorSpec((H, N), tf.float32), tf.TensorSpec((None, H, N, N), tf.float32)]
IMPLEMENTATIONS = {"high level": chunked.wkv}
if keras_adapter.has_kernels and backend._probe():
    IMPLEMENTATIONS["native"] = lambda *x: native(*x)


def native(*x):
    """The native path also in a tf.function, as with RWKV6_TF_NATIVE=1."""
    before, backend._SETTING = backend._SETTING, "1"
    try:
        return backend.wkv(*x)
    finally:
        backend._SETTING = before


def gradients(f):
    def of(*x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, state = f(*x, None)
            loss = tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(state**2)
        return tape.gradient(loss, x)

    return of


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("jit", [False, True])
def test_unknown_batch_and_length(implementation, jit):
    wkv = IMPLEMENTATIONS[implementation]
    f = tf.function(lambda *x: wkv(*x, None), input_signature=SIGNATURE, jit_compile=jit)
    g = tf.function(gradients(wkv), input_signature=SIGNATURE, jit_compile=jit)
    for B, T in ((3, 70), (1, 0)) if jit else ((2, 10), (3, 70), (1, 0), (2, 1)):  # jit: each anew
        x = random_inputs(B, T, H, N, states=B)
        y, state = f(*x)
        expected = recurrence.wkv(*x)
        assert relative_rms(y, expected[0]) < 1e-6
        assert relative_rms(state, expected[1]) < 1e-6
        sent = [np.cos(expected[0]), 2 * expected[1]]
        for name, a, b in zip("rkvwus", g(*x), recurrence.gradients(*sent, *x)):
            assert relative_rms(a, b) < 5e-6, name


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="TensorFlow takes no custom calls")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_native_path_equals_the_high_level_one(dtype):
    x = [tf.constant(a) for a in random_inputs(2, 40, H, N, dtype, states=3)]
    state_map = tf.constant([2, 0])
    bound = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 3e-3, "float16": 5e-4}[dtype]
    for f in (native, tf.function(native), tf.function(native, jit_compile=True)):
        found, expected = f(*x, state_map), chunked.wkv(*x, state_map)
        for a, b in zip(found, expected):
            assert a.dtype == b.dtype
            b = b.numpy().astype("float64")
            assert relative_rms(a.numpy(), b) < bound


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="TensorFlow takes no custom calls")
def test_eager_calls_are_native_and_graphs_can_be_saved_without_it():
    if backend._SETTING is not None:
        pytest.skip("RWKV6_TF_NATIVE is set")
    assert backend._use_kernels()
    x = random_inputs(1, 4, H, N)
    graph = tf.function(lambda *x: ops.wkv(*x)).get_concrete_function(*map(tf.constant, x))
    assert "XlaCallModule" not in {op.type for op in graph.graph.get_operations()}


class Module(tf.Module):
    @tf.function(input_signature=SIGNATURE)
    def __call__(self, *x):
        return chunked.wkv(*x, None)


def test_a_saved_model_needs_nothing_of_ours_and_we_need_no_torch_and_no_compiler(tmp_path):
    """In a new process, one for both: TensorFlow takes long to import."""
    tf.saved_model.save(Module(), str(tmp_path / "saved"))
    x = random_inputs(3, 40, H, N, states=3)
    np.savez(tmp_path / "x.npz", *x)
    code = (
        "import numpy as np, tensorflow as tf\n"
        "f = tf.saved_model.load('saved'); x = np.load('x.npz')\n"
        "y, state = f(*(tf.constant(x[n]) for n in x.files))\n"
        "assert 'keras_adapter' not in sys.modules\n"
        "import keras_adapter\n"
        "np.savez('y.npz', y, state, *keras_adapter.ops.wkv(*(x[n] for n in x.files)))\n"
        "assert not {'torch', 'torch_rwkv6'} & sys.modules.keys()\n"
    )
    done = run(code, tmp_path, PATH="", RWKV6_TF_NATIVE="1")
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "y.npz")
    assert len(found.files) == 4
    for name, b in zip(found.files, recurrence.wkv(*x) * 2):
        assert relative_rms(found[name], b) < 1e-6


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="TensorFlow takes no custom calls")
def test_a_saved_model_with_the_native_path(tmp_path):
    class Native(tf.Module):
        @tf.function(input_signature=SIGNATURE)
        def __call__(self, *x):
            return native(*x, None)

    tf.saved_model.save(Native(), str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    x = random_inputs(2, 9, H, N, states=2)
    assert relative_rms(loaded(*x)[0], recurrence.wkv(*x)[0]) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_an_unknown_number_of_states(implementation, dtype):
    wkv = IMPLEMENTATIONS[implementation]
    signature = [*SIGNATURE, tf.TensorSpec((None,), dtype)]
    f = tf.function(lambda *x: wkv(*x), input_signature=signature)
    for B, S, state_map in ((3, 2, [1, 0, 1]), (2, 5, [4, 2])):
        x = random_inputs(B, 9, H, N)
        x.append(random_inputs(S, 1, H, N, states=S)[5])
        for a, b in zip(f(*x, tf.constant(state_map, dtype)), recurrence.wkv(*x, state_map)):
            assert relative_rms(a, b) < 1e-6
    wrong = [4, 5] if dtype == tf.int32 else [4, 2**32 + 1]
    y, state = f(*x, tf.constant(wrong, dtype))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert np.isnan(state[1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_known_number_of_states_and_an_entry_that_32_bits_would_make_valid(implementation):
    wkv = IMPLEMENTATIONS[implementation]
    x = [tf.constant(a) for a in random_inputs(2, 3, H, N, states=2)]
    f = tf.function(lambda m: wkv(*x, m))
    wrong = tf.constant([0, 2**32 + 1], tf.int64)
    if implementation == "native":
        with pytest.raises(tf.errors.OpError, match=r"state_map: entry 1 is .*, expected 0 to 1"):
            f(wrong)
        return
    y, _ = f(wrong)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_of_states_through_a_map_is_dense(implementation):
    x = [tf.constant(a) for a in random_inputs(3, 5, H, N, states=2)]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y, _ = IMPLEMENTATIONS[implementation](*x, tf.constant([1, 0, 1]))
    gradient = tape.gradient(y, x[5])
    assert isinstance(gradient, tf.Tensor)
    sent = [np.ones(y.shape), np.zeros((3, H, N, N))]
    expected = recurrence.gradients(*sent, *(a.numpy() for a in x), [1, 0, 1])
    assert relative_rms(gradient, expected[5]) < 5e-6


def test_a_saved_model_of_the_operator(tmp_path):
    """The recipe of README.md: any batch and length, and nothing of ours to run it."""
    operator = RWKVKernelOperator(N)
    module = tf.Module()
    tokens = tf.TensorSpec((None, None, H * N), tf.float32)
    u = tf.TensorSpec((H, N), tf.float32)

    @tf.function(input_signature=[tokens, tokens, tokens, tokens, u])
    def run(r, k, v, w, u):
        y, state = operator(r, k, v, w, u, with_state=True)
        return {"y": y, "state": state}

    module.run = run
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for B, T in ((2, 9), (1, 40)):
        x = random_inputs(B, T, H, N)
        found = loaded.run(*map(tf.constant, map(flat, x[:4])), tf.constant(x[4]))
        y, state = recurrence.wkv(*x)
        assert relative_rms(found["y"], flat(y)) < 1e-6
        assert relative_rms(found["state"], state) < 1e-6
    if backend._SETTING is None:
        operations = {op.type for op in run.get_concrete_function().graph.get_operations()}
        assert "XlaCallModule" not in operations


def test_compile_time_does_not_grow_with_the_length():
    """Operations of the graph, which compile time follows; a loop holds one chunk."""

    def operations(T):
        specs = [tf.TensorSpec((1, T, 1, N), tf.float32)] * 4 + [tf.TensorSpec((1, N), tf.float32)]
        f = tf.function(lambda *x: chunked.wkv(*x)).get_concrete_function(*specs)
        return len(f.graph.get_operations())

    assert operations(100_000) == operations(2_000)
    x = [tf.constant(a) for a in random_inputs(1, 20_000, 1, N, extreme=False)]
    f = tf.function(lambda *x: chunked.wkv(*x), jit_compile=True)
    y, _ = f(*x)
    assert np.isfinite(y).all()
