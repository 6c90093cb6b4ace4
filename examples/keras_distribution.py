"""keras.distribution: the same Keras model on one device, data parallel, and model parallel.

Eight virtual CPU devices unless XLA_FLAGS says otherwise. Prints the losses, which must agree.
"""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import cli
import keras
import numpy as np

from keras_adapter import RWKV6ChannelMix, RWKV6TimeMix

WIDTH, HEAD_SIZE, LENGTH, BATCH = 64, 16, 32, 16


def build(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((LENGTH, WIDTH))
    mix = RWKV6TimeMix(0, 1, HEAD_SIZE, lora_mix=8, lora_decay=8, name="time_mix")
    x = x + mix(keras.layers.LayerNormalization()(x))
    mlp = RWKV6ChannelMix(0, 1, name="channel_mix")
    x = x + mlp(keras.layers.LayerNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(8)(x))
    model.compile("adam", "mse")
    return model


def losses(distribution: keras.distribution.Distribution | None, seed: int) -> list[float]:
    keras.distribution.set_distribution(distribution)
    try:
        random = np.random.default_rng(seed)
        x = random.standard_normal((BATCH, LENGTH, WIDTH)).astype("float32")
        y = np.cumsum(x, 1)[..., :8] * 0.1
        history = build(seed).fit(x, y, batch_size=BATCH, epochs=4, verbose=0)
        return [float(loss) for loss in history.history["loss"]]
    finally:
        keras.distribution.set_distribution(None)


@cli.command
def main(argv: list[str] | None = None) -> None:
    seed = cli.parser(__doc__).parse_args(argv).seed
    devices = keras.distribution.list_devices()
    print(f"{len(devices)} devices")
    # heads are cut where the projections' output channels are; `output` takes them as its input
    mesh = keras.distribution.DeviceMesh((len(devices) // 2, 2), ["batch", "model"], devices)
    layout = keras.distribution.LayoutMap(mesh)
    layout["time_mix/(receptance|key|value|gate)/kernel"] = (None, "model")
    layout["time_mix/output/kernel"] = ("model", None)
    layout["time_mix/time_faaaa"] = ("model", None)
    layout["channel_mix/key/kernel"] = (None, "model")
    layout["channel_mix/value/kernel"] = ("model", None)
    runs = {
        "one device": None,
        "DataParallel": keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False),
        "ModelParallel": keras.distribution.ModelParallel(
            layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False
        ),
    }
    found = {name: losses(distribution, seed) for name, distribution in runs.items()}
    for name, values in found.items():
        print(f"{name:14}", "  ".join(f"{loss:.5f}" for loss in values))
    for values in found.values():
        np.testing.assert_allclose(values, found["one device"], rtol=1e-3)


if __name__ == "__main__":
    sys.exit(main())
