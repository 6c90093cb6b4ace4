"""The recurrence as JAX programs write it: `jax.lax.scan` over the tokens, jitted."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.work import OUTPUTS, Arrays, Job, UnsupportedError, Work


def wkv(r, k, v, w, u, state):
    """r, k, v, w [B, T, H, N], u [H, N], state [B, H, N, N] -> y [B, T, H, N], state."""
    dtype = r.dtype
    u = u.astype(jnp.float32)

    def step(state, token):
        r, k, v, w = (x.astype(jnp.float32) for x in token)  # [B, H, N]
        kv = k[..., None] * v[..., None, :]
        y = (r[..., None] * (state + u[..., None] * kv)).sum(-2)
        return jnp.exp(-jnp.exp(w))[..., None] * state + kv, y

    state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in (r, k, v, w)))
    return jnp.moveaxis(y, 0, 1).astype(dtype), state


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    """XLA's threads are as many as the cores the worker may use; race.py sees to that."""
    dtype = getattr(jnp, work.dtype)
    x = {name: jnp.asarray(a, None if name == "state" else dtype) for name, a in inputs.items()}
    args = [x[name] for name in ("r", "k", "v", "w", "u", "state")]
    if work.kind == "forward":
        run = jax.jit(wkv)
    elif work.kind == "decode":
        run = _decode(jax.jit(wkv, donate_argnums=5), args.pop())
    elif work.kind == "forward + backward":
        run = jax.jit(lambda *args: jax.vjp(lambda *a: wkv(*a)[0], *args)[1](x["grad_y"]))
    else:
        raise UnsupportedError("jitted as one with forward: see forward + backward")

    def arrays(results) -> Arrays:
        return {
            name: np.asarray(a.astype(jnp.float32))
            for name, a in zip(OUTPUTS[work.kind], results, strict=True)
        }

    return Job(lambda: jax.block_until_ready(run(*args)), arrays, f"jax {jax.__version__}")


def _decode(step, state):
    def run(*args):
        nonlocal state
        y, state = step(*args, state)
        return y, state

    return run
