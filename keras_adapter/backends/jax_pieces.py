"""WKV inside jax.shard_map over sequences of which every device has a piece.

A piece takes the state S before it to D * S + F behind it, where F is its final state from zeros
and D = exp(-sum_t exp(w_t)) its decay, one for each key. So one gather of (D, F) tells every device
the state that it begins with. The gradient of the state runs through the pieces backwards in the
same way: G behind a piece becomes D * G + E before it. E is again a final state from zeros, of the
same recurrence on the reversed piece, with k = r and v = the gradient of y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from keras_adapter.backends import chunked, jax_mesh
from keras_adapter.checks import state_dtype

Array = Any
Arrays = tuple[Array, ...]
Axes = tuple[str, ...]
Wkv = Callable[..., Arrays]


def over_pieces(compute: Wkv, axis_name: Any) -> Wkv:
    """`compute`, which takes whole sequences, over the pieces of the devices of a mesh axis.

    axis_name: one axis, or several that count as one.
    """
    axes: Axes = tuple(axis_name) if isinstance(axis_name, (list, tuple)) else (axis_name,)

    def wkv(
        r: Array,  # [B, T, H, N], this device's piece
        k: Array,  # [B, T, H, N]
        v: Array,  # [B, T, H, N]
        w: Array,  # [B, T, H, N]
        u: Array,  # [H, N]
        initial_state: Array | None,  # [S, H, N, N]
        state_map: Array | None,  # [B]
    ) -> Arrays:  # y [B, T, H, N], final_state [B, H, N, N]
        own, devices = _place(axes)
        state = chunked.state_of_each(r, initial_state, state_map, state_dtype(r))
        operands = jax_mesh.varying_alike((r, k, v, w, u, state), axes)
        y, end = _of_pieces(compute, axes)(*operands)
        # An all-reduce, and no state out of the gather, because JAX knows its result to be the same
        # on all devices. It is left out of a compiled program that does not use the state.
        return y, jax.lax.psum(jnp.where(own == devices - 1, end, 0), axes)

    return wkv


def _place(axes: Axes) -> tuple[Array, int]:
    """Which device of the axis this one is, and of how many."""
    try:
        return jax.lax.axis_index(axes), jax.lax.psum(1, axes)
    except NameError as error:
        raise ValueError(
            f"axis_name: expected an axis of the mesh of a jax.shard_map around the call, "
            f"got {', '.join(map(repr, axes))}"
        ) from error


def _of_pieces(compute: Wkv, axes: Axes) -> Wkv:
    """WKV of r, k, v, w, u and state [B, H, N, N]: y, and the state behind this device's piece.

    The state counts on the first device only.
    """

    def gather(x: Array) -> Array:  # [devices, ...]
        return jax.lax.all_gather(x, axes)

    def on_the_first(state: Array) -> Array:
        return jnp.where(jax.lax.axis_index(axes) == 0, state, 0)

    def reaching(decays: Array, added: Array, *, reverse: bool = False) -> Array:
        """The state, or the gradient of one, that comes to this piece from the pieces before it."""

        def step(state: Array, piece: Arrays) -> Arrays:
            decay, added = piece
            return decay[..., None] * state + added, state

        _, states = jax.lax.scan(step, jnp.zeros_like(added[0]), (decays, added), reverse=reverse)
        return states[jax.lax.axis_index(axes)]

    def beginning(
        r: Array, k: Array, v: Array, w: Array, u: Array, state: Array
    ) -> Arrays:  # [B, H, N, N], [devices, B, H, N]
        """The state that this piece begins with, and the decays of all."""
        state = on_the_first(state)
        _, end = compute(r, k, v, w, u, state, None)
        rates = jnp.exp(chunked.bounded(w.astype(end.dtype)))
        ends, decays = gather(end), gather(jnp.exp(-rates.sum(1)))
        return state + reaching(decays, ends), decays

    def forward(*operands: Array) -> tuple[Arrays, Any]:
        state, decays = beginning(*operands)
        results, pull = jax.vjp(lambda *x: compute(*x, None), *operands[:5], state)
        r, _, _, w, u, _ = operands
        return results, (pull, r, w, u, decays)

    def backward(kept: Any, grads: Arrays) -> Arrays:
        pull, r, w, u, decays = kept
        grad_y, grad_end = grads
        key, value, decay = (jnp.flip(x, 1) for x in (r, grad_y, w))
        _, added = compute(key, key, value, decay, u, None, None)
        own = decays[jax.lax.axis_index(axes)]
        added = gather(own[..., None] * grad_end + added)
        grad_end = grad_end + reaching(decays, added, reverse=True)
        *found, grad_state = pull((grad_y, grad_end))
        return (*found, on_the_first(grad_state))

    @jax.custom_vjp
    def of_pieces(*operands: Array) -> Arrays:
        state, _ = beginning(*operands)
        return compute(*operands[:5], state, None)

    of_pieces.defvjp(forward, backward)
    return of_pieces
