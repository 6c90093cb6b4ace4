"""Trains a small RWKV-6 language model with Keras, on the backend that KERAS_BACKEND names.

    for b in jax tensorflow torch; do KERAS_BACKEND=$b python examples/keras_train.py; done

All backends read the same text in the same order and, from the second run on, start from the
weights of the first, so that the picture <out>/loss.png holds curves that can be compared.
"""

from __future__ import annotations

import csv
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import cli
import keras
import matplotlib
import numpy as np
from corpus import read_text

from keras_adapter import RWKV6ChannelMix, RWKV6TimeMix


def windows(text: np.ndarray, batch: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random windows of a text, without end: tokens [batch, length] and the tokens after each."""
    for step in itertools.count():
        starts = np.random.default_rng(step).integers(0, len(text) - length, (batch, 1))
        window = text[starts + np.arange(length + 1)]
        yield window[:, :-1], window[:, 1:]


def build(layers: int, width: int, head_size: int) -> keras.Model:
    tokens = keras.Input((None,), dtype="int32")
    # an Embedding with a dense gradient: given the sparse one of an Embedding, Keras' Adam on
    # TensorFlow squares the gradient of every occurrence of a byte in place of their sum
    x = keras.layers.Dense(width, use_bias=False)(keras.ops.one_hot(tokens, 256))
    x = keras.layers.LayerNormalization(epsilon=1e-5)(x)
    for i in range(layers):
        mix = RWKV6TimeMix(i, layers, head_size, lora_mix=8, lora_decay=8)
        x = x + mix(keras.layers.LayerNormalization(epsilon=1e-5)(x))
        mlp = RWKV6ChannelMix(i, layers)
        x = x + mlp(keras.layers.LayerNormalization(epsilon=1e-5)(x))
    x = keras.layers.LayerNormalization(epsilon=1e-5)(x)
    return keras.Model(tokens, keras.layers.Dense(256, use_bias=False)(x))


def draw(out: Path) -> None:
    """The loss of every backend that has left its figures in `out`."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for path, style in zip(sorted(out.glob("*.csv")), ("-", "--", ":", "-.")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name, colour in (("loss", "tab:blue"), ("val_loss", "tab:orange")):
            values = [float(row[name]) for row in rows]
            steps = [int(row["steps"]) for row in rows]
            axes.plot(steps, values, style, color=colour, label=f"{path.stem}, {name}")
    axes.set(xlabel="steps", ylabel="nats per byte", title="RWKV-6 in Keras")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", type=cli.input_file, help="a text; by default the King James Bible, if installed")
    parser.add_output_folder("--out", default="runs/keras", help="folder for all results")
    add("--epochs", type=cli.positive, default=10, help="between which the loss is noted")
    add("--steps", type=cli.positive, default=30, help="of an epoch")
    add("--batch-size", type=cli.positive, default=16, help="texts side by side")
    add("--length", type=cli.positive, default=64, help="bytes of a text")
    add("--n-layer", type=cli.positive, default=2, help="layers")
    add("--n-embd", type=cli.positive, default=64, help="width")
    add("--head-size", type=cli.positive, default=32, help="width of a head")
    options = parser.parse_args(argv)
    text = np.frombuffer(read_text(options.data), np.uint8).astype("int32")
    cut = len(text) - max(len(text) // 50, 8 * options.length)
    if cut <= options.length:
        raise ValueError(f"the text has {len(text)} bytes: too few for --length {options.length}")
    keras.utils.set_random_seed(options.seed)
    model = build(options.n_layer, options.n_embd, options.head_size)
    start = options.out / "start.weights.h5"
    if start.exists():
        try:
            model.load_weights(start)
        except (OSError, ValueError) as error:
            raise ValueError(f"--out: {start} is of another model: {error}") from error
    else:
        model.save_weights(start)

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss)
    data = windows(text[:cut], options.batch_size, options.length)
    val = np.lib.stride_tricks.sliding_window_view(text[cut:], options.length + 1)
    val = val[:: options.length][:64]
    history = model.fit(
        data,
        epochs=options.epochs,
        steps_per_epoch=options.steps,
        validation_data=(val[:, :-1], val[:, 1:]),
    )

    backend = keras.backend.backend()
    with (options.out / f"{backend}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("steps", "loss", "val_loss"))
        losses = zip(history.history["loss"], history.history["val_loss"])
        for epoch, row in enumerate(losses, 1):
            writer.writerow((epoch * options.steps, *row))
    model.save(options.out / f"{backend}.keras")
    draw(options.out)
    bits = history.history["val_loss"][-1] / np.log(2)
    print(f"{backend}: {bits:.3f} bits per byte on unseen text; {options.out / 'loss.png'}")


if __name__ == "__main__":
    sys.exit(main())
