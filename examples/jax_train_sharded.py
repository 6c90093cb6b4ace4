"""Data and head parallel training on a mesh of devices, with jit and optax alone.

The batch is cut over the mesh axis "data", the heads and with them the projections over "model".
jit does the rest: WKV stays where its batch rows and heads are, devices exchange gradients only.
Eight virtual CPU devices unless XLA_FLAGS says otherwise.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import cli
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from keras_adapter.ops import wkv

VOCABULARY, HEADS, HEAD_SIZE = 256, 4, 16
WIDTH = HEADS * HEAD_SIZE
# how each weight lies on the mesh
LAYOUT = {
    "embedding": P(),  # [V, D]
    "rkvw": P(None, None, "model"),  # [4, D, D], output channels by head
    "u": P("model"),  # [H, N]
    "output": P("model"),  # [D, D]
    "head": P(),  # [D, V]
}


def initial(key: jax.Array) -> dict[str, jax.Array]:
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "rkvw": (4, WIDTH, WIDTH),
        "u": (HEADS, HEAD_SIZE),
        "output": (WIDTH, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    return {n: 0.1 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())}


def loss(weights: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:  # [B, T + 1]
    x = weights["embedding"][tokens[:, :-1]]  # [B, T, D]
    normed = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    # token shift, for the key: so the state tells what has followed a token
    before = jnp.pad(normed, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    mixed = jnp.stack((normed, before, normed, normed))  # [4, B, T, D]
    r, k, v, w = jnp.einsum("pbtd,pde->pbte", mixed, weights["rkvw"])
    heads = (*x.shape[:2], HEADS, HEAD_SIZE)
    y, _ = wkv(*(a.reshape(heads) for a in (r, k, v, w - 3)), weights["u"])
    x = x + y.reshape(x.shape) @ weights["output"]
    logits = x @ weights["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def batch(seed: int, size: int, length: int) -> np.ndarray:
    """Random windows of the text, this program's own source: int32 [size, length + 1]."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(text) - length, (size, 1))
    return text[starts + np.arange(length + 1)].astype("int32")


@cli.command
def main(argv: list[str] | None = None) -> None:
    longest = len(Path(__file__).read_bytes()) - 1
    parser = cli.parser(__doc__)
    parser.add_argument("--steps", type=cli.positive, default=300, help="optimiser steps")
    parser.add_argument("--batch-size", type=cli.positive, default=16, help="of all devices")
    parser.add_argument(
        "--length", type=cli.integer(1, longest), default=64, help="bytes, of this program's source"
    )
    options = parser.parse_args(argv)
    model = 2 if jax.device_count() % 2 == 0 else 1
    rows = jax.device_count() // model
    if options.batch_size % rows:
        raise ValueError(
            f"--batch-size: expected a multiple of {rows}, the mesh's devices along the batch, "
            f"got {options.batch_size}"
        )
    mesh = jax.make_mesh((rows, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    weights = {
        name: jax.device_put(x, NamedSharding(mesh, LAYOUT[name]))
        for name, x in initial(jax.random.key(options.seed)).items()
    }
    optimizer = optax.adam(1e-2)
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, tokens):
        value, gradients = jax.value_and_grad(loss)(weights, tokens)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(weights, updates), state, value

    by_batch = NamedSharding(mesh, P("data"))
    tokens = jax.device_put(batch(0, options.batch_size, options.length), by_batch)
    compiled = step.lower(weights, state, tokens).compile()
    shape = re.search(
        r"\((f32\[[\d,]+\])[^=]*custom-call\([^\n]*rwkv6_xla_forward", compiled.as_text()
    )
    print(f"mesh {dict(mesh.shape)}; WKV of one device: {shape[1] if shape else 'keras.ops'}")
    first = None
    for i in range(options.steps):
        tokens = jax.device_put(batch(i, options.batch_size, options.length), by_batch)
        weights, state, value = step(weights, state, tokens)
        first = float(value) if first is None else first
        if i % 25 == 0 or i == options.steps - 1:
            print(f"step {i:4}  loss {float(value):.4f}")
    print(f"loss {first:.3f} -> {float(value):.3f}")


if __name__ == "__main__":
    sys.exit(main())
