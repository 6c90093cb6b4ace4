"""keras_adapter on each backend, in a process of its own: native, high level, and the rivals.

Rivals: the recurrence as `lax.scan` or `tf.while_loop`, the operator of rwkv6-keras-operator where
that is installed (it has gradients on torch only), and torch's native operator, which is part of
every run as the common measure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.timing import interleave

BACKENDS = ("jax", "tensorflow", "torch")
SHAPES = [(2, 512, 4, 64), (1, 2048, 12, 64)]  # B, T, H, N
PEER_TOKENS = 512  # the old operator takes 20 s and 8 GB for 2048 tokens of the second shape

Step = Callable[[], Any]
Contenders = dict[str, tuple[Step, Step | None]]  # forward; forward and backward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=BACKENDS)


def run(args: argparse.Namespace) -> None:
    for backend in args.backends:
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run([sys.executable, "-m", "benchmarks.keras"], env=environment, check=True)


def run_backend() -> None:
    import keras
    import torch

    from benchmarks.report import machine_line

    backend = keras.backend.backend()
    print(f"\n{backend}: {machine_line()}, keras {keras.__version__}")
    for shape in SHAPES:
        contenders = _contenders(backend, shape, _inputs(shape))
        steps: dict[str, Step] = {}
        for name, (forward, both) in contenders.items():
            steps[f"forward, {name}"] = forward
            if both is not None:
                steps[f"forward + backward, {name}"] = both
        seconds = interleave(steps, rounds=5)
        title = "B{} T{} H{} N{}, {} threads".format(*shape, torch.get_num_threads())
        print(f"{title:48} {'min ms':>9} {'median':>9} {'of torch native':>16}")
        for name, (least, median) in sorted(seconds.items()):
            measure = seconds[f"{name.split(', ')[0]}, torch native"][0]
            print(f"{name:48} {least * 1e3:9.2f} {median * 1e3:9.2f} {least / measure:15.2f}x")
    if backend == "jax":
        _bridge()


def _inputs(shape: tuple[int, int, int, int]) -> list[Any]:
    import numpy as np

    B, T, H, N = shape
    g = np.random.default_rng(0)
    x = [g.standard_normal((B, T, H, N)).astype("float32") for _ in range(4)]
    x[3] -= 2
    return [*x, g.standard_normal((H, N)).astype("float32")]


def _contenders(backend: str, shape: tuple[int, int, int, int], x: list[Any]) -> Contenders:
    import torch

    import torch_rwkv6

    leaves = [torch.tensor(a, requires_grad=True) for a in x]
    native = _torch_steps(torch_rwkv6.wkv, leaves)
    own = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[backend](x)
    return {**own, **_peer(backend, shape, x), "torch native": native}


def _torch_steps(f: Callable[..., Any], leaves: list[Any]) -> tuple[Step, Step]:
    import torch

    def forward() -> None:
        with torch.no_grad():
            f(*leaves)

    return forward, lambda: torch.autograd.grad(f(*leaves)[0].sum(), leaves)


def _torch(x: list[Any]) -> Contenders:
    import torch

    from keras_adapter.backends import chunked

    leaves = [torch.tensor(a, requires_grad=True) for a in x]
    return {"torch high level": _torch_steps(chunked.wkv, leaves)}


def _jax(x: list[Any]) -> Contenders:
    import jax
    import jax.numpy as jnp

    from keras_adapter import ops
    from keras_adapter.backends import chunked

    def scanned(r: Any, k: Any, v: Any, w: Any, u: Any) -> Any:
        def step(S: Any, x: Any) -> Any:
            r, k, v, w = x
            kv = k[..., :, None] * v[..., None, :]
            y = jnp.einsum("bhi,bhij->bhj", r, S + u[:, :, None] * kv)
            return jnp.exp(-jnp.exp(w))[..., None] * S + kv, y

        B, _, H, N = r.shape
        tokens = [jnp.moveaxis(a, 1, 0) for a in (r, k, v, w)]
        S, y = jax.lax.scan(step, jnp.zeros((B, H, N, N)), tokens)
        return jnp.moveaxis(y, 0, 1), S

    given = [jnp.asarray(a) for a in x]

    def steps(f: Callable[..., Any]) -> tuple[Step, Step]:
        forward = jax.jit(f)
        both = jax.jit(jax.value_and_grad(lambda *a: f(*a)[0].sum(), range(5)))
        return (
            lambda: jax.block_until_ready(forward(*given)),
            lambda: jax.block_until_ready(both(*given)),
        )

    return {
        "jax native": steps(ops.wkv),
        "jax high level": steps(chunked.wkv),
        "lax.scan": steps(scanned),
    }


def _tensorflow(x: list[Any]) -> Contenders:
    import tensorflow as tf

    from keras_adapter.backends import chunked
    from keras_adapter.backends import tensorflow as backend

    def looped(r: Any, k: Any, v: Any, w: Any, u: Any) -> Any:
        B, T, H, N = r.shape
        r, k, v, w = (tf.transpose(a, (1, 0, 2, 3)) for a in (r, k, v, w))
        decay = tf.exp(-tf.exp(w))

        def step(t: Any, S: Any, y: Any) -> Any:
            kv = k[t][..., :, None] * v[t][..., None, :]
            out = tf.einsum("bhi,bhij->bhj", r[t], S + u[:, :, None] * kv)
            return t + 1, decay[t][..., None] * S + kv, y.write(t, out)

        y = tf.TensorArray(tf.float32, size=T, element_shape=(B, H, N))
        start = (0, tf.zeros((B, H, N, N)), y)
        _, S, y = tf.while_loop(lambda t, *_: t < T, step, start, maximum_iterations=T)
        return tf.transpose(y.stack(), (1, 0, 2, 3)), S

    given = [tf.constant(a) for a in x]

    def steps(f: Callable[..., Any], **options: Any) -> tuple[Step, Step]:
        def gradients(*a: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(a)
                loss = tf.reduce_sum(f(*a)[0])
            return tape.gradient(loss, a)

        forward = tf.function(lambda *a: f(*a), **options)
        both = tf.function(gradients, **options)
        return lambda: forward(*given)[0].numpy(), lambda: both(*given)[0].numpy()

    def native(*a: Any) -> Any:
        return backend.wkv(*a, None, None)

    contenders = {
        "tensorflow high level, jit": steps(chunked.wkv, jit_compile=True),
        "tensorflow high level, graph": steps(chunked.wkv),
        "tf.while_loop, jit": steps(looped, jit_compile=True),
    }
    if backend.has_kernels and backend._probe():
        backend._SETTING = "1"  # as RWKV6_TF_NATIVE=1: inside a tf.function too
        contenders["tensorflow native, jit"] = steps(native, jit_compile=True)
        contenders["tensorflow native, graph"] = steps(native)
    return contenders


def _peer(backend: str, shape: tuple[int, int, int, int], x: list[Any]) -> Contenders:
    B, T, H, N = shape
    if T > PEER_TOKENS or importlib.util.find_spec("rwkv6_keras_operator") is None:
        return {}
    os.environ["OPS_KERNEL"] = "1"  # ours has read it; theirs has no kernel for a CPU
    from rwkv6_keras_operator import RWKVKernelOperator

    operator = RWKVKernelOperator(N, T)
    name = "rwkv6-keras-operator"
    flat = [a.reshape(B, T, H * N) for a in x[:4]] + [x[4]]
    if backend == "torch":
        import torch

        leaves = [torch.tensor(a, requires_grad=True) for a in flat]
        return {name: _torch_steps(operator, leaves)}
    if backend == "jax":
        import jax

        compiled = jax.jit(lambda *a: operator(*a)[0])
        given = [jax.numpy.asarray(a) for a in flat]
        return {name: (lambda: jax.block_until_ready(compiled(*given)), None)}
    import tensorflow as tf

    constants = [tf.constant(a) for a in flat]
    return {name: (lambda: operator(*constants)[0].numpy(), None)}


def _bridge() -> None:
    """The overhead of calling the kernel from JAX, on the smallest tensors."""
    import jax
    import jax.numpy as jnp

    from keras_adapter.ops import wkv

    calls = 1000
    x = [jnp.ones((1, 1, 1, 8))] * 4 + [jnp.ones((1, 8))]
    one = jax.jit(lambda *a: wkv(*a)[0])
    nothing = jax.jit(lambda *a: a[0] + 1)
    # each call takes the r that the one before has made, so that none can be left out
    loop = jax.jit(lambda r, *a: jax.lax.fori_loop(0, calls, lambda _, r: wkv(r, *a)[0], r))
    direct = _direct_call()

    def repeat(f: Step) -> Step:
        def run() -> None:
            for _ in range(calls):
                f()

        return run

    seconds = interleave(
        {
            "a jitted call of wkv": repeat(lambda: jax.block_until_ready(one(*x))),
            "a jitted call of x + 1, for comparison": repeat(
                lambda: jax.block_until_ready(nothing(*x))
            ),
            "wkv inside a jitted loop": lambda: jax.block_until_ready(loop(*x)),
            "the kernel library called by ctypes": repeat(direct),
        },
        rounds=9,
    )
    print(f"{'one call, B = T = H = 1, N = 8':48} {'min us':>9} {'median':>9}")
    for name, (least, median) in seconds.items():
        print(f"{name:48} {least / calls * 1e6:9.2f} {median / calls * 1e6:9.2f}")


def _direct_call() -> Step:
    """rwkv6_wkv_forward on the same tensors, without any framework."""
    import ctypes

    import numpy as np

    from benchmarks.contenders.c_interface import LIBRARY, WkvInputs, dl_tensor

    library = ctypes.CDLL(str(LIBRARY))
    library.rwkv6_wkv_forward.restype = ctypes.c_char_p
    shapes = [(1, 1, 1, 8)] * 4 + [(1, 8), (1, 1, 1, 8), (1, 1, 8, 8)]  # r, k, v, w, u, y, state
    arrays = [np.ones(shape, "float32") for shape in shapes]
    *inputs, y, state = [ctypes.pointer(dl_tensor(x)) for x in arrays]
    arguments = (None, ctypes.byref(WkvInputs(*inputs)), y, state, None)

    def call() -> None:
        message = library.rwkv6_wkv_forward(*arguments)
        if message:
            raise RuntimeError(message)

    call.memory = arrays  # type: ignore[attr-defined]
    return call


if __name__ == "__main__":
    run_backend()
