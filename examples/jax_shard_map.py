"""WKV on several devices by jax.shard_map: the program of rwkv6-keras-operator in today's JAX.

Eight virtual CPU devices unless XLA_FLAGS says otherwise. Both forms of input: the devices as a
dimension of their own, (devices, batch, T, C), and merged into the batch, (devices * batch, T, C).
Then sequences that are too long for one device: (batch, devices * T, C), cut along the tokens.
"""

from __future__ import annotations

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import cli
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from keras_adapter import RWKVKernelOperator
from keras_adapter.ops import wkv


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--batch-size", type=cli.positive, default=2, help="of each device")
    parser.add_argument("--num-heads", type=cli.positive, default=4, help="heads")
    parser.add_argument("--head-size", type=cli.positive, default=64, help="width of a head")
    parser.add_argument("--seq-length", type=cli.positive, default=128, help="tokens")
    options = parser.parse_args(argv)
    heads, head_size = options.num_heads, options.head_size
    hidden = heads * head_size

    mesh = Mesh(np.array(jax.devices()), ("device_axis",))
    devices = mesh.size
    by_device = NamedSharding(mesh, P("device_axis"))
    operator = RWKVKernelOperator(head_size=head_size)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("device_axis"), out_specs=P("device_axis"))
    def call_kernel(r, k, v, w, u):  # each device its part; u has a copy per device
        if r.ndim == 4:  # (1, batch, T, C): the dimension of the devices goes and comes back
            y, state = operator(*(x[0] for x in (r, k, v, w)), u[0], with_state=True)
            return y[None], state[None]
        return operator(r, k, v, w, u[0], with_state=True)

    by_token, whole = P(None, "device_axis"), P()

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(*(by_token,) * 4, whole), out_specs=(by_token, whole))
    def call_on_pieces(r, k, v, w, u):  # (batch, T, heads, head_size): each device its tokens
        return wkv(r, k, v, w, u, axis_name="device_axis")

    keys = jax.random.split(jax.random.key(options.seed), 5)
    shape = (devices, options.batch_size, options.seq_length, hidden)
    r, k, v, w = (jax.random.normal(key, shape) for key in keys[:4])
    u = jnp.broadcast_to(jax.random.normal(keys[4], (hidden,)), (devices, hidden))
    w = w - 2

    merged = [x.reshape(-1, *shape[2:]) for x in (r, k, v, w)]
    expected, expected_state = operator(*merged, u[0], with_state=True)
    for name, tokens in (("a dimension of its own", (r, k, v, w)), ("merged", merged)):
        placed = [jax.device_put(x, by_device) for x in (*tokens, u)]
        y, state = call_kernel(*placed)
        print(f"devices as {name}:")
        print("  y    ", y.shape, y.sharding)
        print("  state", state.shape, state.sharding)
        np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            state.reshape(expected_state.shape), expected_state, rtol=1e-4, atol=1e-4
        )

    def by_heads(x):  # (devices, batch, T, C) -> (batch, devices * T, heads, head_size)
        return jnp.moveaxis(x, 0, 1).reshape(options.batch_size, -1, heads, head_size)

    long = [*map(by_heads, (r, k, v, w)), u[0].reshape(heads, head_size)]
    y, state = call_on_pieces(*long)
    print("sequences in pieces:")
    print("  y    ", y.shape, y.sharding)
    print("  state", state.shape, state.sharding)
    for found, expected in zip((y, state), wkv(*long)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    print("all equal the results of one device")


if __name__ == "__main__":
    sys.exit(main())
