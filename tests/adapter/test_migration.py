"""A model written against rwkv6_keras_operator: only its import line changes."""

import importlib
import importlib.util

import keras
import numpy as np
import pytest
from backend import BACKEND, DIFFERENTIABLE, array, gradients, tensor
from samples import flat, random_inputs

from keras_adapter import RWKVKernelOperator, get_rwkv6_kernel

# In the manner of bert4keras3: padding by w = -1e9 and k = v = 0, an initial state that is tuned.
OLD_MODEL = """
import keras
from keras import ops
from rwkv6_keras_operator import RWKVKernelOperator

class TimeMix(keras.layers.Layer):
    def __init__(self, head_size, operator, tune_state=False, **kwargs):
        super().__init__(**kwargs)
        self.head_size, self.operator, self.tune_state = head_size, operator, tune_state
        self.supports_masking = True

    def build(self, shape):
        C = shape[-1]
        heads = (C // self.head_size, self.head_size)
        self.maps = [keras.layers.Dense(C, use_bias=False) for _ in "rkvwo"]
        self.u = self.add_weight(name="u", shape=heads, initializer="random_normal")
        self.state = None
        if self.tune_state:
            shape = (1, *heads, self.head_size)
            self.state = self.add_weight(name="state", shape=shape, initializer="zeros")

    def call(self, x, mask=None):
        r, k, v, w, _ = (dense(x) for dense in self.maps)
        w = w - 2.0
        if mask is not None:
            mask = ops.cast(mask[:, :, None], x.dtype)
            k, v = k * mask, v * mask
            w = w * mask + (1.0 - mask) * -1e9
        y, _ = self.operator(r, k, v, w, self.u, with_state=False, init_state=self.state)
        return x + self.maps[4](y)

def make(tune_state):
    operator = RWKVKernelOperator(head_size=8, max_sequence_length=64)
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(11, 16, mask_zero=True)(inputs)
    x = TimeMix(8, operator, tune_state)(x)
    return keras.Model(inputs, keras.layers.Dense(11)(keras.layers.LayerNormalization()(x)))
"""


@pytest.mark.skipif(not DIFFERENTIABLE, reason="no training on this backend")
@pytest.mark.parametrize("tune_state", [False, True])
def test_the_old_model_trains_after_its_import_line_is_changed(tune_state):
    keras.utils.set_random_seed(0)
    scope = {}
    exec(OLD_MODEL.replace("from rwkv6_keras_operator", "from keras_adapter"), scope)
    model = scope["make"](tune_state)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-1), loss)
    words = np.tile(np.arange(1, 11), 9)[:80].reshape(4, 20)
    words[0, 15:] = words[1, 10:] = 0  # sequences of their own lengths
    history = model.fit(words[:, :-1], words[:, 1:], epochs=25, batch_size=4, verbose=0)
    losses = history.history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.3 * losses[0]
    if tune_state:
        state = next(w for w in model.weights if w.name == "state")
        assert np.abs(array(state)).max() > 1e-3


def inputs(states=None):
    x = random_inputs(3, 24, 2, 8, states=states, extreme=False)
    return [tensor(flat(a)) for a in x[:4]] + [tensor(a) for a in x[4:]]


def assert_close(found, expected):
    np.testing.assert_allclose(array(found), array(expected), rtol=2e-4, atol=2e-5)


def peer(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPS_KERNEL", "1")  # theirs has no kernel for a CPU; ours has read it already
        return importlib.import_module(name)


@pytest.mark.parametrize("state_map", [None, [1, 0, 1]])
def test_agrees_with_rwkv6_keras_operator(state_map):
    """Installed from PyPI; where it works on a CPU."""
    theirs = peer("rwkv6_keras_operator").RWKVKernelOperator(8, 64)
    x = inputs(states=3 if state_map is None else 2)
    if state_map is not None and BACKEND in ("jax", "tensorflow"):
        with pytest.raises(Exception, match=""):  # test_peer_failures.py: test_state_map_crashes
            theirs(*x[:5], True, x[5], state_map)
        return
    for a, b in zip(
        RWKVKernelOperator(8)(*x[:5], True, x[5], state_map), theirs(*x[:5], True, x[5], state_map)
    ):
        assert_close(a, b)


@pytest.mark.parametrize("with_state", [False, True])
def test_agrees_with_rwkv_ops(with_state):
    """Installed from PyPI, its implementation "native"."""
    theirs = peer("rwkv_ops").get_rwkv6_kernel(8, "native", 64)
    ours, x = get_rwkv6_kernel(8, "native", 64), inputs(states=3)
    options = {"initial_state": x[5], "output_final_state": with_state}
    found, expected = ours(*x[:5], **options), theirs(*x[:5], **options)
    if not with_state:
        found, expected = (found,), (expected,)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@pytest.mark.skipif(BACKEND != "torch", reason="theirs has gradients on torch alone")
def test_gradients_agree_with_rwkv6_keras_operator():
    theirs = peer("rwkv6_keras_operator").RWKVKernelOperator(8, 64)
    x = inputs()
    grad = tensor(np.random.default_rng(4).standard_normal((3, 24, 16)).astype("float32"))
    _, found = gradients(lambda *a: RWKVKernelOperator(8)(*a)[:1], x, [grad])
    _, expected = gradients(lambda *a: theirs(*a)[:1], x, [grad])
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
