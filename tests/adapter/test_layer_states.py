"""What a layer carries from piece to piece: float32 under every policy, and never padding's."""

import keras
import numpy as np
import pytest
from backend import BACKEND, DIFFERENTIABLE, array, quick, relative_rms, tensor
from layers import KINDS, LAYERS, OPTIONS, B, D, N, T, make, tokens

MODELS = pytest.mark.skipif(BACKEND == "numpy", reason="keras has no models on numpy")
POLICIES = ("mixed_bfloat16", "mixed_float16")
HEADS = D // N


def dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def states(kind, seed=5):
    """A shift, and for a time mix a state that half precision holds neither in range nor digits."""
    g = np.random.default_rng(seed)
    shift = g.integers(-8, 8, (B, D)).astype("float32")
    if kind == "channel":
        return [shift]
    return [shift, (1e5 + g.standard_normal((B, HEADS, N, N))).astype("float32")]


@KINDS
@pytest.mark.parametrize("policy", POLICIES)
def test_carried_states_are_never_rounded(kind, policy):
    """Through a piece of padding, and one without tokens, they pass bit for bit."""
    layer, given = make(kind, dtype=policy, return_state=True), states(kind)
    assert layer.compute_dtype == policy.removeprefix("mixed_")
    padding = np.zeros((B, 2), bool)
    for x, mask in ((tokens(length=2), padding), (tokens(length=0), padding[:, :0])):
        f = quick(lambda x, mask, *given: layer(x, *given, mask=mask))
        y, *found = f(tensor(x), tensor(mask), *(tensor(a) for a in given))
        assert dtype(y) == dtype(found[0]) == layer.compute_dtype
        assert np.isfinite(array(y).astype("float32")).all()
        assert [dtype(a) for a in found[1:]] == ["float32"] * len(given[1:])
        for a, right in zip(found, given, strict=True):
            np.testing.assert_array_equal(array(a).astype("float32"), right)


@pytest.mark.parametrize("policy", POLICIES)
def test_pieces_under_mixed_precision_are_the_whole(policy):
    layer, x = make("time", dtype=policy, return_state=True), tokens()
    f = quick(layer)
    state, outputs = (), []
    for piece in np.split(x, 4, axis=1):
        y, *state = f(tensor(piece), *state)
        outputs.append(array(y))
    whole = f(tensor(x))
    assert relative_rms(np.concatenate(outputs, 1), array(whole[0])) < 1e-3
    np.testing.assert_array_equal(array(state[0]), array(whole[1]))
    assert relative_rms(array(state[1]), array(whole[2])) < 1e-5


def masks():
    """Padding on the right, on the left, within, everywhere, nowhere."""
    mask = np.ones((5, T), bool)
    mask[0, 7:] = mask[1, :5] = mask[2, [0, 3, 4, 8, 11]] = mask[3] = False
    return mask


@KINDS
@pytest.mark.parametrize(("carried", "mask_dtype"), [(False, "int32"), (True, "bool")])
def test_padding_is_as_if_it_were_not_there(kind, carried, mask_dtype):
    layer, mask = make(kind, return_state=True), masks()
    g = np.random.default_rng(3)
    x = g.standard_normal((5, T, D)).astype("float32")
    x[~mask] = np.nan
    given = []
    if carried:
        given = [g.standard_normal((5, D)).astype("float32")]
        given += [g.standard_normal((5, HEADS, N, N)).astype("float32")] * (kind == "time")
    f = quick(lambda x, mask, *given: layer(x, *given, mask=mask))
    y, *found = f(tensor(x), tensor(mask.astype(mask_dtype)), *(tensor(a) for a in given))
    assert np.isfinite(array(y)).all()
    for b, row in enumerate(mask):
        own = (tensor(a[b : b + 1]) for a in given)
        alone = [array(a) for a in quick(layer)(tensor(x[b : b + 1, row]), *own)]
        np.testing.assert_allclose(array(y)[b, row], alone[0][0], rtol=1e-4, atol=1e-4)
        for a, right in zip(found, alone[1:], strict=True):
            np.testing.assert_allclose(array(a)[b], right[0], rtol=1e-4, atol=1e-4)


@KINDS
def test_padded_pieces_under_mixed_precision_are_the_whole(kind):
    layer, x = make(kind, return_state=True, dtype="mixed_bfloat16"), tokens()
    f = quick(lambda x, mask, *given: layer(x, *given, mask=mask))
    place, given, outputs = 0, [], []
    for count in (5, 1, 0, 6):
        padded, mask = np.full((B, 7, D), 9.0, "float32"), np.zeros((B, 7), bool)
        start = 7 - count if count == 1 else 0  # the second is padded on the left
        padded[:, start : start + count] = x[:, place : place + count]
        mask[:, start : start + count] = True
        y, *given = f(tensor(padded), tensor(mask), *given)
        outputs.append(array(y)[:, start : start + count])
        place += count
    whole = [array(a) for a in quick(layer)(tensor(x))]
    for found, right in zip([np.concatenate(outputs, 1), *map(array, given)], whole, strict=True):
        assert relative_rms(found, right) < 1e-2


@KINDS
def test_a_mask_that_comes_with_x_counts_beside_states_too(kind):
    """Of an Embedding layer, eagerly; without `mask` named."""
    layer = make(kind, return_state=True)
    words = np.array([[1, 2, 3, 0, 0], [0, 4, 0, 3, 2], [1, 2, 3, 4, 1]], "int32")
    embedding = keras.layers.Embedding(5, D, mask_zero=True)
    embedding.build()
    given = [tensor(a) for a in states(kind)]
    found = quick(lambda words, *given: layer(embedding(words), *given))(tensor(words), *given)
    x = array(embedding(tensor(words)))
    masked = quick(lambda x, mask, *given: layer(x, *given, mask=mask))
    right = masked(tensor(x), tensor(words != 0), *given)
    for a, b in zip(found[1:], right[1:], strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-5, atol=1e-5)
    alone = array(quick(layer)(tensor(x[1:2, [1, 3, 4]]), *(a[1:2] for a in given))[1])
    np.testing.assert_allclose(array(found[1])[1], alone[0], rtol=1e-5)


@MODELS
@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_with_states_mask_and_policy_is_saved_and_loaded(policy, tmp_path):
    words = keras.Input((None,), dtype="int32")
    shift, state = keras.Input((D,)), keras.Input((HEADS, N, N))
    embedded = keras.layers.Embedding(5, D, mask_zero=True)(words)
    outputs = make("time", dtype=policy, return_state=True)(embedded, shift, state)
    assert [dtype(a) for a in outputs[1:]] == [policy.removeprefix("mixed_"), "float32"]
    assert [tuple(a.shape) for a in outputs] == [(None, None, D), (None, D), (None, HEADS, N, N)]
    ours = keras.Model([words, shift, state], outputs)
    given = states("time")
    mixed = np.array([[1, 2, 0, 0], [0, 1, 0, 4], [0, 0, 0, 0]], "int32")
    before = [array(a) for a in quick(ours)([tensor(a) for a in (mixed, *given)])]
    np.testing.assert_array_equal(before[2][2], given[1][2])  # nothing but padding
    np.testing.assert_array_equal(before[1][2].astype("float32"), given[0][2])
    assert np.abs(before[2][0] - given[1][0]).max() > 1
    ours.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    after = quick(loaded)([tensor(a) for a in (mixed, *given)])
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(array(a), b)


@pytest.mark.skipif(not DIFFERENTIABLE, reason="no training on this backend")
def test_a_masked_model_trains_under_mixed_precision():
    keras.utils.set_random_seed(0)
    words = keras.Input((None,), dtype="int32")
    h = keras.layers.Embedding(7, D, mask_zero=True, dtype="mixed_bfloat16")(words)
    h = make("channel", dtype="mixed_bfloat16")(make("time", dtype="mixed_bfloat16")(h) + h)
    ours = keras.Model(words, keras.layers.Dense(7, dtype="float32")(h))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ours.compile(keras.optimizers.SGD(1.0), loss, jit_compile=BACKEND == "jax")
    x = np.tile(np.arange(1, 7), 6).reshape(4, 9)
    x[0, 6:] = x[1, :4] = x[2, 3:5] = 0
    losses = ours.fit(x, x, epochs=5, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@KINDS
def test_time_distributed(kind):
    """It calls the layer's `call` itself, under its own policy."""
    layer = make(kind, dtype="mixed_bfloat16")
    x = np.random.default_rng(2).standard_normal((B, 2, 6, D)).astype("float32")
    mask = np.ones((B, 2, 6), bool)
    mask[:, 1, 4:] = False
    wrapper = keras.layers.TimeDistributed(layer)
    found = array(quick(lambda x, mask: wrapper(x, mask=mask))(tensor(x), tensor(mask)))
    for i, length in ((0, 6), (1, 4)):
        right = array(quick(layer)(tensor(x[:, i, :length])))
        assert relative_rms(found[:, i, :length], right) < 1e-2
    assert wrapper.compute_output_shape((None, 2, 6, D)) == (None, 2, 6, D)


@KINDS
def test_output_shapes(kind):
    assert make(kind).compute_output_shape((None, 6, D)) == (None, 6, D)
    shapes = make(kind, return_state=True).compute_output_shape((2, None, D))
    assert shapes == ((2, None, D), (2, D), (2, HEADS, N, N))[: len(shapes)]
    assert len(shapes) == (3 if kind == "time" else 2)


@KINDS
@pytest.mark.parametrize("policy", ["float64", "bfloat16", "float16"])
def test_layers_of_every_dtype(kind, policy):
    layer, x = LAYERS[kind](1, 3, **OPTIONS[kind], dtype=policy, return_state=True), tokens()
    layer.build((None, None, D))
    outputs = quick(layer)(tensor(x))
    right = make(kind)
    right.set_official_weights(layer.get_official_weights())
    limit = {"float64": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}[policy]
    assert dtype(outputs[0]) == dtype(tensor(np.zeros(1), policy))  # JAX makes float64 float32
    key = layer.get_official_weights()["key.weight"]  # orthogonal: its columns, times its gain
    gram = key.T @ key if len(key) > D else key @ key.T
    np.testing.assert_allclose(gram, gram[0, 0] * np.eye(D), atol=2e-2)
    assert relative_rms(array(outputs[0]), array(quick(right)(tensor(x)))) < limit


@KINDS
def test_arguments_that_do_not_fit_are_named(kind):
    layer, x = make(kind), tensor(tokens())
    shift, mask = np.zeros((B, D), "float32"), np.ones((B, T), bool)
    cases = [
        (
            TypeError,
            "shift: expected float64 or float32 or bfloat16 or float16, got bool",
            {"shift": mask},
        ),
        (ValueError, r"shift: expected \[B, D\] = \(3, 16\), got", {"shift": shift[:1]}),
        (ValueError, r"shift: expected \[B, D\]", {"shift": shift[:, None]}),
        (ValueError, r"mask: expected \[B, T\] = \(3, 12\), got", {"mask": mask[:, :4]}),
        (ValueError, r"mask: expected \[B, T\]", {"mask": mask[..., None]}),
        (TypeError, "mask: expected bool or int8 .* got float32", {"mask": mask * np.float32(1)}),
    ]
    if kind == "time":
        state = np.zeros((B, HEADS, N, N), "float32")
        cases += [
            (ValueError, r"state: expected \[B, H, N, N\] = \(3, 2, 8, 8\)", {"state": state[:2]}),
            (ValueError, r"state: expected \[B, H, N, N\]", {"state": state[0]}),
            (
                TypeError,
                "state: expected float64 or float32 or bfloat16 or float16, got int32",
                {"state": state.astype("int32")},
            ),
            (ValueError, r"shift: expected \[B, D\]", {"shift": state}),
        ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            layer(x, **{name: tensor(a) for name, a in arguments.items()})
        if BACKEND != "numpy":
            given = {n: keras.KerasTensor(a.shape, str(a.dtype)) for n, a in arguments.items()}
            with pytest.raises(error, match=message):
                layer(keras.KerasTensor((B, T, D)), **given)
    with pytest.raises(TypeError, match="shift: expected a tensor, got"):
        layer(x, shift=[[0.0] * D] * B)
    with pytest.raises(ValueError, match="x: expected the width D = 16, got shape"):
        layer(tensor(np.zeros((B, T, 8), "float32")))
