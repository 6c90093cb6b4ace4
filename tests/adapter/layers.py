"""The layers that the tests of layers share: small, with random weights."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_adapter import RWKV6ChannelMix, RWKV6TimeMix

B, T, D, N = 3, 12, 16, 8
OPTIONS = {"time": {"head_size": N, "lora_mix": 4, "lora_decay": 6}, "channel": {"n_ffn": 24}}
LAYERS = {"time": RWKV6TimeMix, "channel": RWKV6ChannelMix}
KINDS = pytest.mark.parametrize("kind", LAYERS)


def make(kind, *, seed=0, **options):
    """A layer with random weights: the official start has zeros that hide mistakes."""
    keras.utils.set_random_seed(seed)
    layer = LAYERS[kind](1, 3, **OPTIONS[kind], **options)
    layer.build((None, None, D))
    g = np.random.default_rng(seed)
    weights = layer.get_official_weights()
    scale = {"time_decay": 1.0}
    layer.set_official_weights(
        {n: x + scale.get(n, 0.3) * g.standard_normal(x.shape) for n, x in weights.items()}
    )
    return layer


def tokens(seed=1, length=T):
    return np.random.default_rng(seed).standard_normal((B, length, D)).astype("float32")


def expected(kind, layer, x):
    """The layer of torch_rwkv6.nn with the same weights, in float64."""
    torch = pytest.importorskip("torch")
    from torch_rwkv6 import nn

    if kind == "time":
        module = nn.TimeMix(D, 1, 3, N, lora_mix=4, lora_decay=6)
    else:
        module = nn.ChannelMix(D, 1, 3, 24)
    state = {n: torch.tensor(a) for n, a in layer.get_official_weights().items()}
    module.load_state_dict(state, strict=True)
    with torch.no_grad():
        return [a.numpy() for a in module.double()(torch.tensor(x, dtype=torch.float64))], module
