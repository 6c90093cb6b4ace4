"""WKV in keras.ops: a few large matrix products instead of a loop over tokens, on every backend.

Tokens are cut into chunks of up to 32. With l_t = -exp(w_t), the log of the decay, token t sees
token s < t through

    sum_i r_t[i] k_s[i] exp(l_{s+1}[i] + ... + l_{t-1}[i])

Inside a chunk, runs of 1, 2, 4, ... tokens are joined in pairs: each token of the second run sees
each of the first, with r decayed from the border between the runs and k decayed up to it. Chunks
see earlier chunks through the state. Every exponent is a sum of log decays and never a difference
of running sums, so none is positive and none cancels: nothing overflows, whatever w is. Nothing is
masked by a product with zero, so a NaN or an infinity reaches exactly the results, forward and
backward, that it reaches in the recurrence.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_adapter.checks import state_dtype

CHUNK = 32  # a power of two
UNROLLED = 32  # up to this many chunks the graph is unrolled; beyond that it has a loop
Steps = tuple[Any, Any, Any]  # see _step
_LARGEST_W = 80.0  # exp(-exp(80)) is 0 in every dtype, and sums of exp(80) are finite in float32
_SLOW = -0.5  # log decays above it belong to slow decays


def wkv(
    r: Any,  # [B, T, H, N]
    k: Any,  # [B, T, H, N]
    v: Any,  # [B, T, H, N]
    w: Any,  # [B, T, H, N]
    u: Any,  # [H, N]
    initial_state: Any | None = None,  # [S, H, N, N]
    state_map: Any | None = None,  # [B]
) -> tuple[Any, Any]:  # y [B, T, H, N], final_state [B, H, N, N]
    dtype = keras.backend.standardize_dtype(r.dtype)
    wide = state_dtype(r)
    # keras.ops' products of float64 are float32 everywhere else
    acc = wide if keras.backend.backend() == "tensorflow" else "float32"
    r, k, v, w, u = (ops.cast(x, acc) for x in (r, k, v, w, u))
    state = state_of_each(r, initial_state, state_map, acc)
    log_decay = -ops.exp(bounded(w))
    # the token itself, through u
    bonus = ops.sum(r * u * k, axis=-1, keepdims=True) * v
    if r.shape[1] == 0 and keras.backend.backend() == "openvino":
        return ops.cast(r, dtype), ops.cast(state, wide)  # it crashes on products of empty tensors
    if r.shape[1] == 1:
        y, state = _one_token(r, k, v, log_decay, state)
    else:
        y, state = chunks(r, k, v, log_decay, state)
    return ops.cast(y + bonus, dtype), ops.cast(state, wide)


def bounded(w: Any) -> Any:  # [B, T, H, N]
    """w, or _LARGEST_W where it is larger.

    There tanh is 1 and its derivative 0, which multiplies the incoming gradient: a NaN stays NaN.
    """
    return ops.where(w > _LARGEST_W, _LARGEST_W * ops.tanh(w), w)


def state_of_each(
    r: Any,  # [B, T, H, N]
    initial_state: Any | None,  # [S, H, N, N]
    state_map: Any | None,  # [B]
    acc: str,
) -> Any:  # [B, H, N, N]
    """The state that each sequence starts from; NaN where state_map is out of range."""
    batch, _, heads, size = ops.shape(r)
    if initial_state is None:
        return ops.zeros((batch, heads, size, size), dtype=acc)
    states = ops.cast(initial_state, acc)
    if state_map is None:
        return ops.broadcast_to(states, (batch, heads, size, size))
    count = ops.shape(states)[0]
    if ops.is_tensor(count):  # TensorFlow's, of int32
        count = ops.cast(count, state_map.dtype)
    # as rows: the gradient of a reshape is a dense tensor, in TensorFlow too
    rows = ops.reshape(states, (ops.shape(states)[0], heads * size * size))
    chosen = ops.take(rows, ops.clip(state_map, 0, count - 1), axis=0)
    valid = ops.logical_and(state_map >= 0, state_map < count)
    chosen = ops.where(ops.expand_dims(valid, 1), chosen, np.nan)
    return ops.reshape(chosen, (batch, heads, size, size))


def _one_token(
    r: Any,  # [B, 1, H, N]
    k: Any,  # [B, 1, H, N]
    v: Any,  # [B, 1, H, N]
    log_decay: Any,  # [B, 1, H, N]
    state: Any,  # [B, H, N, N]
) -> tuple[Any, Any]:  # [B, 1, H, N], [B, H, N, N]
    y = ops.squeeze(ops.matmul(ops.expand_dims(r, -2), ops.expand_dims(state, 1)), -2)
    # y does not depend on the decay of its own token. This adds w to its graph nevertheless, so
    # that a backend returns zeros as the gradient of w and not None.
    y = ops.where(ops.zeros_like(y, dtype="bool"), log_decay, y)
    keep, change = _decay(ops.expand_dims(log_decay[:, 0], -1))
    update = ops.expand_dims(k[:, 0], -1) * ops.expand_dims(v[:, 0], -2)
    return y, _step(keep, change, update, state)


def chunks(
    r: Any,  # [B, T, H, N]
    k: Any,  # [B, T, H, N]
    v: Any,  # [B, T, H, N]
    log_decay: Any,  # [B, T, H, N]
    state: Any,  # [B, H, N, N]
) -> tuple[Any, Any]:  # [B, T, H, N], [B, H, N, N]
    batch, tokens, heads, size = ops.shape(r)
    if keras.backend.backend() == "torch":
        import torch

        if torch.compiler.is_compiling():  # as one operator: see torch_chunks.py
            y, state = torch.ops.keras_adapter.wkv_chunks(r, k, v, log_decay, state)
            return y, state
    if isinstance(tokens, int):
        chunk = min(CHUNK, 1 << max(tokens - 1, 0).bit_length())
        count = max(1, -(-tokens // chunk))
    else:
        chunk, count = CHUNK, tokens // CHUNK + 1

    def cut(x: Any) -> Any:  # [B, T, H, N] -> [B, H, count, chunk, N]
        # padding has k = v = 0 and a log decay of 0: the state stays as it is
        x = ops.pad(x, [[0, 0], [0, count * chunk - tokens], [0, 0], [0, 0]])
        x = ops.transpose(x, (0, 2, 1, 3))
        return ops.reshape(x, (batch, heads, count, chunk, size))

    r, k, v, log_decay = (cut(x) for x in (r, k, v, log_decay))
    y, before, after, total = _within(r, k, v, log_decay, chunk)
    # across chunks, through the state at the start of each
    update = ops.matmul(ops.transpose(k * ops.exp(after), (0, 1, 2, 4, 3)), v)
    keep, change = _decay(ops.transpose(total, (0, 1, 2, 4, 3)))  # [B, H, count, N, 1]
    states, state = _walk((keep, change, update), state, count)
    y = y + ops.matmul(r * ops.exp(before), states)
    y = ops.reshape(y, (batch, heads, count * chunk, size))
    return ops.transpose(y, (0, 2, 1, 3))[:, :tokens], state


def _within(
    r: Any,  # [B, H, count, chunk, N]
    k: Any,  # [B, H, count, chunk, N]
    v: Any,  # [B, H, count, chunk, N]
    log_decay: Any,  # [B, H, count, chunk, N]
    chunk: int,
) -> tuple[Any, Any, Any, Any]:  # three [B, H, count, chunk, N], [B, H, count, 1, N]
    """The part of y that comes from earlier tokens of the same chunk.

    Also the sums of log decays before each token, after each token, and of the whole chunk.
    """
    batch, heads, count, _, size = ops.shape(r)

    def halves(x: Any, rows: int) -> Any:  # of neighbouring runs, `rows` rows each
        pairs = count * (chunk // (2 * run))
        return _each(ops.reshape(x, (batch, heads, pairs, 2, rows, size)), 2, axis=3)

    def joined(first: Any, second: Any) -> Any:
        return ops.concatenate([first, second], axis=3)

    y, total = ops.zeros_like(v), log_decay
    before = after = ops.zeros_like(log_decay)
    run = 1
    while run < chunk:
        (_, r2), (k1, _), (v1, _) = (halves(x, run) for x in (r, k, v))
        (y1, y2), (before1, before2) = halves(y, run), halves(before, run)
        (after1, after2), (total1, total2) = halves(after, run), halves(total, 1)
        if run == 1:  # nothing lies between neighbours
            seen_v = ops.sum(r2 * k1, axis=-1, keepdims=True) * v1
        else:
            r2, k1 = r2 * ops.exp(before2), k1 * ops.exp(after1)
            seen = ops.matmul(r2, ops.transpose(k1, (0, 1, 2, 4, 3)))  # [B, H, runs, run, run]
            seen_v = ops.matmul(seen, v1)
        y = joined(y1, y2 + seen_v)
        before, after = joined(before1, total1 + before2), joined(after1 + total2, after2)
        total = total1 + total2
        run *= 2
    shape = (batch, heads, count, chunk, size)
    y, before, after = (ops.reshape(x, shape) for x in (y, before, after))
    return y, before, after, ops.reshape(total, (batch, heads, count, 1, size))


def _decay(log_decay: Any) -> tuple[Any, Any]:
    """exp(log_decay) as a sum: 1 or 0, and the rest.

    A slow decay is near 1, where rounding loses digits in the same way at every step, which adds up
    over thousands of steps. So its difference from 1 is kept instead.
    """
    is_slow = log_decay > _SLOW
    change = ops.where(is_slow, ops.expm1(log_decay), ops.exp(log_decay))
    return ops.cast(is_slow, log_decay.dtype), change


def _step(keep: Any, change: Any, update: Any, state: Any) -> Any:
    return keep * state + (change * state + update)


def _walk(
    steps: Steps,  # keep and change [B, H, count, N, 1], update [B, H, count, N, N]
    state: Any,  # [B, H, N, N]
    count: Any,
) -> tuple[Any, Any]:  # [B, H, count, N, N], [B, H, N, N]
    """The state before each chunk, and after the last."""
    backend = keras.backend.backend()
    short = isinstance(count, int) and count <= UNROLLED
    if short or backend not in ("jax", "tensorflow"):
        states = []
        for keep, change, update in zip(*(_each(x, count) for x in steps)):
            states.append(state)
            state = _step(keep, change, update, state)
        return ops.stack(states, axis=2), state
    walk = _tensorflow_loop if backend == "tensorflow" else _scan
    states, state = walk(tuple(ops.moveaxis(x, 2, 0) for x in steps), state, count)
    return ops.moveaxis(states, 0, 2), state


def _each(x: Any, count: int, axis: int = 2) -> Any:  # `count` tensors without that axis
    if keras.backend.backend() == "openvino":  # which lacks unstack in Keras 3.12
        return [x[(slice(None),) * axis + (i,)] for i in range(count)]
    # Not by n indexing operations, whose gradients would each be a whole tensor.
    return ops.unstack(x, count, axis=axis)


# Loops over chunks. Each takes the steps [count, B, H, ...] and the state [B, H, N, N], and returns
# the states before each chunk [count, B, H, N, N] and the last.
def _scan(steps: Steps, state: Any, count: Any) -> tuple[Any, Any]:
    import jax

    from keras_adapter.backends import jax_mesh

    def step(state: Any, x: Any) -> tuple[Any, Any]:
        keep, change, update = x
        return _step(keep, change, update, state), state

    first, *each = jax_mesh.varying_alike((state, *steps))
    last, states = jax.lax.scan(step, first, each)
    return states, last


def _tensorflow_loop(steps: Steps, state: Any, count: Any) -> tuple[Any, Any]:
    # keras.ops has no loop that TensorFlow differentiates, compiles and takes any length of
    import tensorflow as tf

    def step(i: Any, state: Any, states: Any) -> tuple[Any, Any, Any]:
        keep, change, update = (x[i] for x in steps)
        return i + 1, _step(keep, change, update, state), states.write(i, state)

    states = tf.TensorArray(state.dtype, size=count, element_shape=state.shape)
    _, last, states = tf.while_loop(
        lambda i, state, states: i < count,
        step,
        (0, state, states),
        maximum_iterations=count,
    )
    return states.stack(), last
