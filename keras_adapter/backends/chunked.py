"""WKV in keras.ops: few large products in place of a loop over tokens, on every backend.

Tokens are cut into chunks of up to 32, chunks into blocks of 8. With l_t = -exp(w_t), the log of
the decay, token t sees token s < t through

    sum_i r_t[i] k_s[i] exp(l_{s+1}[i] + ... + l_{t-1}[i])

within a block exactly so, between blocks of a chunk by factors split at the borders of blocks, and
across chunks through the state. Every exponent is a sum of log decays, formed by a product with a
constant 0/1 matrix and never as a difference of running sums: none is positive, none cancels, so
nothing overflows, whatever w is.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

CHUNK, BLOCK = 32, 8
UNROLLED = 32  # up to this many chunks the graph holds each of them; beyond, a loop
_LARGEST_W = 80.0  # exp(-exp(80)) is 0 in every dtype, and sums of exp(80) are finite in float32


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
    wide = "float64" if dtype == "float64" else "float32"
    # keras.ops' products of float64 are float32 everywhere else
    acc = wide if keras.backend.backend() == "tensorflow" else "float32"
    r, k, v, w, u = (ops.cast(x, acc) for x in (r, k, v, w, u))
    state = _state_of_each(r, initial_state, state_map, acc)
    log_decay = -ops.exp(ops.minimum(w, _LARGEST_W))
    # the token itself, through u
    bonus = ops.sum(r * u * k, axis=-1, keepdims=True) * v
    if r.shape[1] == 0 and keras.backend.backend() == "openvino":
        return ops.cast(r, dtype), ops.cast(state, wide)  # it crashes on products of empty tensors
    if r.shape[1] == 1:
        y, state = _one_token(r, k, v, log_decay, state)
    else:
        y, state = _chunks(r, k, v, log_decay, state)
    return ops.cast(y + bonus, dtype), ops.cast(state, wide)


def _state_of_each(
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
    last = ops.shape(states)[0] - 1
    chosen = ops.take(states, ops.clip(state_map, 0, last), axis=0)
    valid = ops.logical_and(state_map >= 0, state_map <= last)
    return ops.where(ops.reshape(valid, (-1, 1, 1, 1)), chosen, np.nan)


def _one_token(
    r: Any,  # [B, 1, H, N]
    k: Any,  # [B, 1, H, N]
    v: Any,  # [B, 1, H, N]
    log_decay: Any,  # [B, 1, H, N]
    state: Any,  # [B, H, N, N]
) -> tuple[Any, Any]:  # [B, 1, H, N], [B, H, N, N]
    y = ops.squeeze(ops.matmul(ops.expand_dims(r, -2), ops.expand_dims(state, 1)), -2)
    y = y + 0.0 * log_decay  # y does not see its own decay; the gradient is a zero and not missing
    decay = ops.expand_dims(ops.exp(log_decay[:, 0]), -1)
    return y, decay * state + ops.expand_dims(k[:, 0], -1) * ops.expand_dims(v[:, 0], -2)


def _chunks(
    r: Any,  # [B, T, H, N]
    k: Any,  # [B, T, H, N]
    v: Any,  # [B, T, H, N]
    log_decay: Any,  # [B, T, H, N]
    state: Any,  # [B, H, N, N]
) -> tuple[Any, Any]:  # [B, T, H, N], [B, H, N, N]
    batch, tokens, heads, size = ops.shape(r)
    acc = keras.backend.standardize_dtype(r.dtype)
    chunk = CHUNK
    if isinstance(tokens, int):
        chunk = min(CHUNK, max(1, -(-tokens // BLOCK)) * BLOCK)
        count = max(1, -(-tokens // chunk))
    else:
        count = ops.maximum(1, (tokens + chunk - 1) // chunk)
    blocks = chunk // BLOCK

    def cut(x: Any) -> Any:  # [B, T, H, N] -> [B, H, count, blocks, BLOCK, N]
        # padding has k = v = 0 and a log decay of 0: the state stays as it is
        x = ops.pad(x, [[0, 0], [0, count * chunk - tokens], [0, 0], [0, 0]])
        x = ops.transpose(x, (0, 2, 1, 3))
        return ops.reshape(x, (batch, heads, count, blocks, BLOCK, size))

    r, k, v, log_decay = (cut(x) for x in (r, k, v, log_decay))

    # Within a block: pairs of tokens s < t, P of them.
    later, earlier, between, place = _pairs(BLOCK, acc)
    decay = ops.exp(ops.matmul(between, log_decay))  # [B, H, count, blocks, P, N]
    seen = ops.sum(ops.matmul(later, r) * ops.matmul(earlier, k) * decay, axis=-1)
    seen = ops.matmul(seen, place)
    y = ops.matmul(ops.reshape(seen, (batch, heads, count, blocks, BLOCK, BLOCK)), v)

    # Between blocks a > b of a chunk: r decayed from the start of block a, k to the end of b.
    before, after = _borders(BLOCK, acc)
    r = r * ops.exp(ops.matmul(before, log_decay))
    k = k * ops.exp(ops.matmul(after, log_decay))
    log_decay = ops.sum(log_decay, axis=-2)  # [B, H, count, blocks, N]
    if blocks > 1:
        later, earlier, between, _ = _pairs(blocks, acc)
        leading = (batch, heads, count)

        def take(which: Any, x: Any) -> Any:  # [..., blocks, BLOCK, N] -> [..., P, BLOCK, N]
            rows = ops.matmul(which, ops.reshape(x, (*leading, which.shape[1], BLOCK * size)))
            return ops.reshape(rows, (*leading, which.shape[0], BLOCK, size))

        decay = ops.expand_dims(ops.exp(ops.matmul(between, log_decay)), -2)
        keys = ops.transpose(take(earlier, k), (0, 1, 2, 3, 5, 4))
        seen = ops.matmul(take(later, r) * decay, keys)  # [B, H, count, P, BLOCK, BLOCK]
        y = y + take(ops.transpose(later), ops.matmul(seen, take(earlier, v)))
        before, after = _borders(blocks, acc)
        r = r * ops.exp(ops.expand_dims(ops.matmul(before, log_decay), -2))
        k = k * ops.exp(ops.expand_dims(ops.matmul(after, log_decay), -2))

    # Across chunks: through the state at the start of each.
    r, k, v, y = (ops.reshape(x, (batch, heads, count, chunk, size)) for x in (r, k, v, y))
    update = ops.matmul(ops.transpose(k, (0, 1, 2, 4, 3)), v)  # [B, H, count, N, N]
    decay = ops.expand_dims(ops.exp(ops.sum(log_decay, axis=-2)), -1)  # [B, H, count, N, 1]
    states, state = _walk(decay, update, state, count)
    y = ops.reshape(y + ops.matmul(r, states), (batch, heads, count * chunk, size))
    return ops.transpose(y, (0, 2, 1, 3))[:, :tokens], state


def _pairs(n: int, acc: str) -> tuple[Any, Any, Any, Any]:
    """The P = n (n - 1) / 2 pairs s < t of n rows, as 0/1 matrices to multiply the rows with.

    later [P, n] takes row t of each pair, earlier [P, n] row s, and between [P, n] adds up the rows
    s < j < t. place [P, n * n] puts a number of each pair at (t, s) of an n by n matrix.
    """
    pairs = [(t, s) for t in range(n) for s in range(t)]
    later = _rows([t for t, _ in pairs], n, acc)
    earlier = _rows([s for _, s in pairs], n, acc)
    before, after = _borders(n, acc)
    between = ops.matmul(later, before) * ops.matmul(earlier, after)
    return later, earlier, between, _rows([t * n + s for t, s in pairs], n * n, acc)


def _rows(indices: list[int], n: int, acc: str) -> Any:  # [len(indices), n]
    """Those rows of the identity. (Not NumPy's, which torch.compile does not trace.)"""
    wanted = ops.expand_dims(ops.convert_to_tensor(indices, dtype="int32"), 1)
    return ops.cast(ops.equal(wanted, ops.arange(n, dtype="int32")), acc)


def _borders(n: int, acc: str) -> tuple[Any, Any]:
    """before [n, n] adds up the rows j < t for every t, after [n, n] the rows j > t."""
    j = ops.arange(n)
    before = ops.cast(ops.less(ops.expand_dims(j, 0), ops.expand_dims(j, 1)), acc)
    return before, ops.transpose(before)


def _walk(
    decay: Any,  # [B, H, count, N, 1]
    update: Any,  # [B, H, count, N, N]
    state: Any,  # [B, H, N, N]
    count: Any,
) -> tuple[Any, Any]:  # [B, H, count, N, N], [B, H, N, N]
    """The state before each chunk, and after the last."""
    backend = keras.backend.backend()
    short = isinstance(count, int) and count <= UNROLLED
    if short or backend not in ("jax", "tensorflow"):
        states = []
        for chunk_decay, chunk_update in zip(_each(decay, count), _each(update, count)):
            states.append(state)
            state = chunk_decay * state + chunk_update
        return ops.stack(states, axis=2), state
    decay, update = ops.moveaxis(decay, 2, 0), ops.moveaxis(update, 2, 0)
    walk = _tensorflow_loop if backend == "tensorflow" else _scan
    states, state = walk(decay, update, state, count)
    return ops.moveaxis(states, 0, 2), state


def _each(x: Any, count: int) -> Any:  # [B, H, count, ...] -> count of [B, H, ...]
    if keras.backend.backend() == "openvino":  # which lacks unstack in Keras 3.12
        return [x[:, :, i] for i in range(count)]
    # not an index per chunk: the gradient of n indexings costs n whole tensors
    return ops.unstack(x, count, axis=2)


def _scan(
    decay: Any,  # [count, B, H, N, 1]
    update: Any,  # [count, B, H, N, N]
    state: Any,  # [B, H, N, N]
    count: int,
) -> tuple[Any, Any]:
    last, states = ops.scan(lambda s, x: (x[0] * s + x[1], s), state, (decay, update))
    return states, last


def _tensorflow_loop(
    decay: Any,  # [count, B, H, N, 1]
    update: Any,  # [count, B, H, N, N]
    state: Any,  # [B, H, N, N]
    count: Any,
) -> tuple[Any, Any]:
    # keras.ops has no loop that TensorFlow differentiates, compiles and takes any length of
    import tensorflow as tf

    states = tf.TensorArray(state.dtype, size=count, element_shape=state.shape)
    _, last, states = tf.while_loop(
        lambda i, s, states: i < count,
        lambda i, s, states: (i + 1, decay[i] * s + update[i], states.write(i, s)),
        (0, state, states),
        maximum_iterations=count,
    )
    return states.stack(), last
