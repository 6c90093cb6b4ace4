"""RWKV6TimeMix and RWKV6ChannelMix: outputs, states, masks, saving, policies, official weights."""

import keras
import numpy as np
import pytest
from backend import BACKEND, DIFFERENTIABLE, array, quick, tensor
from layers import KINDS, LAYERS, OPTIONS, B, D, T, expected, make, tokens

from keras_adapter import RWKV6ChannelMix, RWKV6TimeMix


@KINDS
def test_equals_the_torch_layer_with_the_same_weights(kind):
    layer, x = make(kind, return_state=True), tokens()
    for found, right in zip(quick(layer)(tensor(x)), expected(kind, layer, x)[0], strict=True):
        np.testing.assert_allclose(array(found), right, rtol=1e-4, atol=2e-4)


@KINDS
def test_starts_as_the_torch_layer_and_takes_its_weights(kind):
    pytest.importorskip("torch")
    layer = LAYERS[kind](1, 3, **OPTIONS[kind])
    layer.build((None, None, D))
    start = layer.get_official_weights()
    fresh = expected(kind, layer, tokens())[1]
    fresh.reset_parameters()
    official = {n: a.detach().float().numpy() for n, a in fresh.state_dict().items()}
    assert set(official) == set(start)
    random = ("w2", "weight")  # drawn anew; the norm's weight and all others are fixed
    for name, value in official.items():
        assert start[name].shape == value.shape, name
        if name == "ln_x.weight" or not name.endswith(random):
            np.testing.assert_allclose(start[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        elif not value.any():
            assert not start[name].any(), name
    layer.set_official_weights(official)
    for name, value in layer.get_official_weights().items():
        np.testing.assert_array_equal(value, official[name])


@KINDS
def test_weights_that_do_not_fit_are_refused_whole(kind):
    layer = make(kind)
    before = layer.get_official_weights()
    for change, message in (
        ({"key.weight": np.zeros((2, 2))}, "key.weight: expected shape"),
        ({"surprise": np.zeros(1)}, r"surplus \['surprise'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_official_weights({**{n: 0 * x for n, x in before.items()}, **change})
    with pytest.raises(ValueError, match=r"missing \['key.weight'\]"):
        layer.set_official_weights({n: x for n, x in before.items() if n != "key.weight"})
    for name, value in layer.get_official_weights().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(ValueError, match="no weights yet"):
        LAYERS[kind](0, 1).get_official_weights()


@KINDS
def test_a_sequence_in_pieces(kind):
    layer, x = make(kind, return_state=True), tokens()
    whole = quick(layer)(tensor(x))
    state, pieces = (), []
    for piece in np.split(x, [4, 5, 6], axis=1):
        y, *state = quick(layer)(tensor(piece), *state)
        pieces.append(array(y))
    np.testing.assert_allclose(np.concatenate(pieces, 1), array(whole[0]), rtol=1e-4, atol=1e-4)
    for found, right in zip(state, whole[1:], strict=True):
        np.testing.assert_allclose(array(found), array(right), rtol=1e-4, atol=1e-5)


@KINDS
def test_padding_on_the_left_is_as_if_it_were_not_there(kind):
    layer, x = make(kind, return_state=True), tokens()
    mask = np.ones((B, T), bool)
    mask[1, :5] = False
    masked = quick(lambda x, mask: layer(x, mask=mask))
    whole = [array(a)[1] for a in masked(tensor(x), tensor(mask))]
    alone = [array(a)[0] for a in quick(layer)(tensor(x[1:2, 5:]))]
    np.testing.assert_allclose(whole[0][5:], alone[0], rtol=1e-4, atol=1e-5)
    for found, right in zip(whole[1:], alone[1:]):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def test_a_mask_comes_from_the_embedding():
    layer = make("time")
    words = np.array([[0, 0, 3, 4], [1, 2, 3, 4]], "int32")
    embedding = keras.layers.Embedding(5, D, mask_zero=True)
    embedding.build()
    f = quick(lambda words: layer(embedding(words)))
    masked = array(f(tensor(words)))
    right = array(f(tensor(words[:1, 2:])))
    np.testing.assert_allclose(masked[:1, 2:], right, rtol=1e-4, atol=1e-5)


def model(policy=None, length=None):
    x = keras.Input((length, D))
    h = keras.layers.LayerNormalization(dtype=policy)(x)
    h = make("time", dtype=policy)(h) + h
    h = make("channel", dtype=policy)(h) + h
    return keras.Model(x, keras.layers.Dense(4, dtype="float32")(h))


def test_save_and_load(tmp_path):
    if BACKEND == "numpy":
        pytest.skip("keras has no models on numpy tensors alone")
    ours = model()
    before = ours.predict(tokens(), verbose=0)
    ours.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(tokens(), verbose=0), before)
    for a, b in zip(loaded.weights, ours.weights, strict=True):
        np.testing.assert_array_equal(array(a), array(b))


@KINDS
def test_config(kind):
    layer = make(kind, return_state=True, name="mix", dtype="mixed_bfloat16")
    again = LAYERS[kind].from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


@pytest.mark.skipif(not DIFFERENTIABLE, reason="no training on this backend")
@pytest.mark.parametrize(  # in float32, and with Adam, which is slow to trace: test_keras_train.py
    ("policy", "length", "jit"),
    [("mixed_bfloat16", T, BACKEND != "torch"), ("mixed_float16", None, BACKEND == "jax")],
)
def test_fit_learns(policy, length, jit):
    keras.utils.set_random_seed(0)
    ours = model(policy, length)
    ours.compile(keras.optimizers.SGD(3e-2), "mse", jit_compile=jit)
    x = tokens()
    y = np.cumsum(x, 1)[..., :4] * 0.1
    size, epochs = (B, 12) if jit else (2, 6)  # XLA would compile for the last batch of 1 anew
    losses = ours.fit(x, y, batch_size=size, epochs=epochs, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    layer = ours.layers[2]
    assert layer.compute_dtype == policy.removeprefix("mixed_")
    assert layer.time_decay.dtype == "float32"


@KINDS
def test_bad_options_are_named(kind):
    layer = LAYERS[kind]
    with pytest.raises(ValueError, match="layer_id: expected 0 to n_layer - 1 = 1, got 2"):
        layer(2, 2)
    with pytest.raises(ValueError, match="x: expected 3 dimensions"):
        layer(0, 1)(tensor(np.zeros((2, D), "float32")))
    with pytest.raises(TypeError, match="return_state: expected True or False, got"):
        layer(0, 1, return_state=np.zeros((B, 1)))
    integers = {"time": ("head_size", "lora_mix", "lora_decay"), "channel": ("n_ffn",)}[kind]
    for value in (4.5, 4.0, "64", True):
        for arguments in ({"layer_id": value, "n_layer": 99}, {"layer_id": 0, "n_layer": value}):
            with pytest.raises(TypeError, match=r"(layer_id|n_layer): expected an int, got"):
                layer(**arguments)
        for name in integers:
            with pytest.raises(TypeError, match=f"{name}: expected an int, got"):
                layer(0, 1, **{name: value})
    for name in integers:
        with pytest.raises(ValueError, match=f"{name}: expected .*, got 0"):
            layer(0, 1, **{name: 0})
        assert layer(0, 1, **{name: np.int64(4)}).get_config()[name] == 4


def test_bad_options_of_the_time_mix_are_named():
    with pytest.raises(ValueError, match="head_size: expected a divisor of 16, got 7"):
        RWKV6TimeMix(0, 1, 7)(tensor(tokens()))
    with pytest.raises(ValueError, match="head_size: expected 1 to 256, got 257"):
        RWKV6TimeMix(0, 1, 257)
    with pytest.raises(TypeError, match="ln_x_eps: expected a number, got 'small'"):
        RWKV6TimeMix(0, 1, ln_x_eps="small")
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ln_x_eps: expected a finite number"):
            RWKV6TimeMix(0, 1, ln_x_eps=value)
    with pytest.raises(TypeError, match="high_level: expected True or False, got 'yes'"):
        RWKV6TimeMix(0, 1, high_level="yes")


def test_a_channel_mix_too_narrow_for_the_official_hidden_width_asks_for_one():
    x = tensor(np.ones((1, 2, 9), "float32"))
    with pytest.raises(ValueError, match=r"n_ffn: .* is 0 for an x of width D = 9; .* pass n_ffn"):
        RWKV6ChannelMix(0, 1)(x)
    assert tuple(quick(RWKV6ChannelMix(0, 1, 4))(x).shape) == (1, 2, 9)
    wide = RWKV6ChannelMix(0, 1)
    wide.build((1, 2, 10))
    assert wide.get_official_weights()["key.weight"].shape == (32, 10)


@pytest.mark.parametrize("high_level", [None, False, True])
def test_high_level_chooses_what_computes_wkv(high_level):
    layer = make("time", high_level=high_level)
    assert layer.get_config()["high_level"] is high_level
    right = expected("time", layer, tokens())[0][0]
    np.testing.assert_allclose(array(quick(layer)(tensor(tokens()))), right, rtol=1e-4, atol=2e-4)


def test_high_level_goes_to_the_operator(monkeypatch):
    from keras_adapter.layers import time_mix

    found, wkv = [], time_mix.wkv
    monkeypatch.setattr(time_mix, "wkv", lambda *a, high_level: found.append(high_level) or wkv(*a))
    for high_level in (None, False, True):
        make("time", high_level=high_level)(tensor(tokens()))
    assert found == [None, False, True]
