"""Official weights of layers with LoRA and of quantized ones."""

import keras
import numpy as np
import pytest
from backend import BACKEND, array, quick, tensor
from layers import KINDS, LAYERS, OPTIONS, D, expected, make, tokens


def with_lora(layer, name, rank=2):
    """LoRA in one map; returns what it adds to the official weight."""
    dense = getattr(layer, name)
    dense.enable_lora(rank, lora_alpha=3 * rank)
    g = np.random.default_rng(7)
    a, b = (
        g.standard_normal(tuple(x.shape)).astype("float32")
        for x in (dense.lora_kernel_a, dense.lora_kernel_b)
    )
    dense.lora_kernel_a.assign(a)
    dense.lora_kernel_b.assign(b)
    return 3 * (a.astype("float64") @ b).T


@KINDS
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_lora_is_merged(kind, policy):
    layer = make(kind, dtype=policy)
    before = layer.get_official_weights()
    added = {f"{name}.weight": with_lora(layer, name) for name in ("key", "receptance")}
    after = layer.get_official_weights()
    assert list(after) == list(before)
    for name, value in after.items():
        right = before[name] + added.get(name, 0)
        np.testing.assert_allclose(value, right, rtol=1e-6, atol=1e-6, err_msg=name)
    if policy == "float32":  # what the layer computes with
        right = expected(kind, layer, tokens())[0][0]
        np.testing.assert_allclose(
            array(quick(layer)(tensor(tokens()))), right, rtol=1e-3, atol=2e-3
        )


@pytest.mark.parametrize(
    ("mode", "policy", "levels"),
    [
        ("int8", "float32", 127),
        ("int8", "mixed_bfloat16", 127),
        ("int4", "float32", 7),
        ("float8", "float32", None),
    ],
)
def test_quantized_maps_come_back_as_the_values_they_stand_for(mode, policy, levels):
    layer = make("time", dtype=policy)
    before = layer.get_official_weights()
    for name in ("key", "value"):
        getattr(layer, name).quantize(mode)
    added = with_lora(layer, "key") if mode != "float8" else 0
    after = layer.get_official_weights()
    assert list(after) == list(before)
    for name, value in after.items():
        assert value.dtype == np.float32
        assert value.shape == before[name].shape
        if name not in ("key.weight", "value.weight") or levels is None:
            np.testing.assert_array_equal(value, before[name])
            continue
        base = value - added if name == "key.weight" else value
        # within the step of the quantization, which is the largest value's over the levels; with a
        # zero point, as int4 has here, about the same
        step = np.abs(before[name]).max() / levels
        error = np.abs(base - before[name]).max()
        assert 0 < error < step, name


def test_a_quantization_that_cannot_be_undone_is_refused():
    layer = make("time")
    config = keras.quantizers.GPTQConfig(dataset=["text"], tokenizer=str.split)
    layer.key.quantize("gptq", config=config)
    with pytest.raises(ValueError, match=r"key.weight: is quantized as 'gptq'"):
        layer.get_official_weights()


@KINDS
def test_maps_with_lora_and_quantized_ones_are_not_overwritten(kind):
    for change, word in (
        (lambda dense: dense.enable_lora(2), "LoRA"),
        (lambda dense: dense.quantize("int8"), "is quantized"),
    ):
        layer = make(kind)
        before = layer.get_official_weights()
        change(layer.key)
        kept = layer.get_official_weights()
        with pytest.raises(ValueError, match=rf"key.weight: its layer .*{word}"):
            layer.set_official_weights({n: 0 * x for n, x in before.items()})
        for name, value in layer.get_official_weights().items():
            np.testing.assert_array_equal(value, kept[name])


def test_values_that_are_no_numbers_are_refused():
    layer = make("time")
    weights = layer.get_official_weights()
    with pytest.raises(ValueError, match=r"key.weight: expected real numbers"):
        layer.set_official_weights({**weights, "key.weight": [["a"] * D] * D})
    for name, value in layer.get_official_weights().items():
        np.testing.assert_array_equal(value, weights[name])


@KINDS
@pytest.mark.parametrize("policy", ["bfloat16", "float64"])
def test_official_weights_are_arrays_that_torch_takes(kind, policy):
    layer = make(kind, dtype=policy)
    weights = layer.get_official_weights()
    kinds = {str(x.dtype) for x in weights.values()}
    assert kinds == {"float32"} if policy == "bfloat16" else kinds <= {"float32", "float64"}
    assert expected(kind, layer, tokens())[0][0].shape == tokens().shape
    layer.set_official_weights(weights)
    for name, value in layer.get_official_weights().items():
        np.testing.assert_array_equal(value, weights[name])


@pytest.mark.skipif(BACKEND == "numpy", reason="keras has no models on numpy")
@pytest.mark.parametrize(("mode", "policy"), [("int8", "mixed_bfloat16"), ("int4", "float32")])
def test_a_quantized_model_is_saved_and_loaded(mode, policy, tmp_path):
    x = keras.Input((None, D))
    ours = keras.Model(x, make("channel", dtype=policy)(make("time", dtype=policy)(x)))
    ours.quantize(mode)
    before = array(quick(ours)(tensor(tokens())))
    weights = [layer.get_official_weights() for layer in ours.layers[1:]]
    ours.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(quick(loaded)(tensor(tokens()))), before)
    for layer, right in zip(loaded.layers[1:], weights, strict=True):
        for name, value in layer.get_official_weights().items():
            np.testing.assert_array_equal(value, right[name], err_msg=name)


@KINDS
def test_a_layer_under_a_quantized_policy(kind):
    layer = LAYERS[kind](1, 3, **OPTIONS[kind], dtype="int8_from_float32")
    assert tuple(quick(layer)(tensor(tokens())).shape) == tokens().shape
    assert layer.key.quantization_mode == "int8"
    again = LAYERS[kind].from_config(layer.get_config())
    assert again.dtype_policy.name == "int8_from_float32"
