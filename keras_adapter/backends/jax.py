"""WKV on JAX: the kernel library as an XLA custom call that supports every transform.

Forward and backward are each ``custom_vmap(custom_partitioning(ffi_call))``, in this order because
custom_partitioning has no batching rule; a custom_vjp joins the two. Batch is the first dimension
of every operand of the custom call, including u. So vmap folds into the batch, a mesh may shard the
batch and heads of all operands alike, and the transpose of u's broadcast sums its gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from keras_adapter import _library
from keras_adapter.backends import chunked, jax_chunks, jax_mesh
from keras_adapter.backends.jax_mesh import HEADS, ROWS, STATES, TOKENS
from keras_adapter.checks import state_dtype

Array = Any
Arrays = tuple[Array, ...]


def _register() -> frozenset[str]:
    """Registers the custom calls. Returns the names of the backends that can run them."""
    binding = _library.load()
    if binding is None:
        return frozenset()
    suffixes = {"cpu": ""}
    if _library.built_with_cuda(binding):
        suffixes["CUDA"] = "_cuda"
    for platform, suffix in suffixes.items():
        for name in (_library.FORWARD, _library.BACKWARD):
            handler = jax.ffi.pycapsule(getattr(binding, name + suffix))
            jax.ffi.register_ffi_target(name, handler, platform=platform)
    return frozenset({"cpu", "gpu"} if "CUDA" in suffixes else {"cpu"})


_native_backends = _register()
has_kernels: bool = bool(_native_backends)


def _is_native() -> bool:
    backend = jax.default_backend()
    if backend == "gpu" and "rocm" in jax.devices()[0].client.platform_version:
        return False
    return backend in _native_backends


def wkv(
    r: Array,  # [B, T, H, N]
    k: Array,  # [B, T, H, N]
    v: Array,  # [B, T, H, N]
    w: Array,  # [B, T, H, N]
    u: Array,  # [H, N]
    initial_state: Array | None,  # [S, H, N, N]
    state_map: Array | None,  # [B]
) -> tuple[Array, Array]:  # y [B, T, H, N], final_state [B, H, N, N]
    compute = jax_mesh.with_auto_axes(_native if _is_native() else jax_chunks.wkv)
    y, final_state = compute(r, k, v, w, u, initial_state, state_map)
    return y, final_state


_INT32 = (np.iinfo(np.int32).min, np.iinfo(np.int32).max)


@functools.partial(jax.jit, inline=True)
def _native(
    r: Array,  # [B, T, H, N]
    k: Array,  # [B, T, H, N]
    v: Array,  # [B, T, H, N]
    w: Array,  # [B, T, H, N]
    u: Array,  # [H, N]
    initial_state: Array | None,  # [S, H, N, N]
    state_map: Array | None,  # [B]
) -> tuple[Array, Array]:  # y [B, T, H, N], final_state [B, H, N, N]
    batch, _, heads, size = r.shape
    # in the dtype of the state, because the gradients of u are still to be summed over the batch
    u = jnp.broadcast_to(u.astype(state_dtype(r)), (batch, heads, size))
    operands = [r, k, v, w, u]
    states = 0
    if initial_state is not None:
        operands.append(chunked.state_of_each(r, initial_state, state_map, state_dtype(r)))
        if state_map is not None:
            # an entry out of range is an error of the custom call on the CPU; on a GPU, where
            # nobody looks at it, its state is NaN. The call takes 32 bits.
            states = initial_state.shape[0]
            operands.append(jnp.clip(state_map, *_INT32).astype(jnp.int32))
    return _operator(len(operands), states)(*jax_mesh.varying_alike(tuple(operands)))


@functools.cache
def _operator(count: int, states: int) -> Callable[..., Arrays]:
    """WKV of `count` operands: r, k, v, w, u [B, H, N], then perhaps state and state_map [B].

    states: how many states the entries of state_map may name.
    """
    floats = (TOKENS,) * 4 + (HEADS, STATES)
    forward = _batched(
        functools.partial(_call_forward, states=states),
        (*floats, ROWS)[:count],
        (TOKENS, STATES),
    )
    backward_call = _batched(
        functools.partial(_call_backward, states=states),
        (TOKENS, STATES, *(*floats, ROWS)[:count]),
        floats[:count],
    )

    @jax.custom_vjp
    def wkv(*operands: Array) -> Arrays:
        return forward(*operands)

    @jax.custom_vjp
    def backward(*operands: Array) -> Arrays:
        return backward_call(*operands)

    def guarded(function: Callable[..., Arrays], *operands: Array) -> Arrays:
        return function(*map(_reverse_mode_only, operands))

    def wkv_backward(operands: Arrays, grads: Arrays) -> Arrays:
        found = guarded(backward, *jax_mesh.varying_alike((*grads, *operands)))
        return (*found, None)[:count] if count == 7 else found

    def backward_backward(operands: Arrays, grads: Arrays) -> Arrays:
        # the second derivative and beyond: through the high-level implementation
        floats, index = operands[: 2 + min(count, 6)], operands[2 + min(count, 6) :]
        _, vjp = jax.vjp(_high_level_backward, *floats)
        return (*vjp(grads), *(None for _ in index))

    wkv.defvjp(lambda *x: (guarded(wkv, *x), x), wkv_backward)
    backward.defvjp(lambda *x: (guarded(backward, *x), x), backward_backward)
    return functools.partial(guarded, wkv)


def _reverse_mode_only(x: Array) -> Array:
    """x; forward mode is refused with a message that names the alternative.

    JAX's own message for custom_vjp functions does not mention it.
    """
    return _input.bind(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _refuse(*_: Any, **__: Any) -> Any:
    raise TypeError(
        "wkv: the native kernels have no forward-mode derivatives (jax.jvp, jax.jacfwd, "
        "jax.linearize, jax.hessian); with high_level=True, or with OPS_KERNEL=1 in the "
        "environment before the import, WKV is computed with keras.ops, which has them"
    )


# Both are the identity: of an input, and of the tangent that belongs to it. Reverse mode transposes
# the tangent's, forward mode evaluates it.
_input, _tangent = Primitive("rwkv6_input"), Primitive("rwkv6_tangent")
for _primitive in (_input, _tangent):
    _primitive.def_abstract_eval(lambda x: x)
_input.def_impl(lambda x: x)
mlir.register_lowering(_input, lambda context, x: [x])
batching.primitive_batchers[_input] = lambda x, axes: (_input.bind(*x), *axes)
ad.primitive_jvps[_input] = lambda x, tangents: (
    _input.bind(*x),
    tangents[0] if isinstance(tangents[0], ad.Zero) else _tangent.bind(*tangents),
)
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, _refuse)
batching.primitive_batchers[_tangent] = _refuse
ad.primitive_transposes[_tangent] = lambda grad, x: (grad,)


def _call_forward(
    r: Array,  # [B, T, H, N]
    *operands: Array,  # k, v, w, u, perhaps state and state_map
    states: int,
) -> Arrays:
    batch, _, heads, size = r.shape
    call = jax.ffi.ffi_call(
        _library.FORWARD,
        (
            jax.ShapeDtypeStruct(r.shape, r.dtype),
            jax.ShapeDtypeStruct((batch, heads, size, size), state_dtype(r)),
        ),
        # XLA updates the state in place where the old one is not needed
        input_output_aliases={5: 1} if len(operands) > 4 else {},
    )
    return jax_mesh.vary_like(r, call(r, *operands, states=np.int64(states)))


def _call_backward(
    grad_y: Array,  # [B, T, H, N]
    grad_final_state: Array,  # [B, H, N, N]
    *operands: Array,  # r, k, v, w, u, perhaps state and state_map
    states: int,
) -> Arrays:
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:6])
    call = jax.ffi.ffi_call(_library.BACKWARD, results)
    found = call(grad_y, grad_final_state, *operands, states=np.int64(states))
    return jax_mesh.vary_like(grad_y, found)


def _high_level_backward(
    grad_y: Array,  # [B, T, H, N]
    grad_final_state: Array,  # [B, H, N, N]
    *floats: Array,  # r, k, v, w, u [B, H, N], perhaps state
) -> Arrays:
    def forward(r: Array, k: Array, v: Array, w: Array, u: Array, *state: Array) -> Arrays:
        return jax_chunks.wkv(r, k, v, w, u[:, None], *state)

    _, vjp = jax.vjp(forward, *floats)
    return tuple(vjp((grad_y, grad_final_state)))


def _batched(
    call: Callable[..., Arrays], operands: tuple[str, ...], results: tuple[str, ...]
) -> Callable[..., Arrays]:
    """`call` with rules for meshes and for vmap; the dimensions of its operands and results."""
    partitioned = custom_partitioning(lambda *args: call(*args))

    def shardings(mesh: Any, dims: tuple[str, ...], axes: dict[str, Any]) -> tuple[Any, ...]:
        # t, n and m are whole on every device, whatever was suggested
        return tuple(jax_mesh.named_sharding(mesh, x, axes) for x in dims)

    def partition(mesh: Any, args: Any, out: Any) -> Any:
        axes = jax_mesh.batch_and_head_axes(mesh, (*zip(operands, args), *zip(results, out)))
        return mesh, call, shardings(mesh, results, axes), shardings(mesh, operands, axes)

    rule = f"{', '.join(operands)} -> {', '.join(results)}"
    try:
        whole = {"need_replication_factors": ("t", "n", "m")}
        partitioned.def_partition(partition, sharding_rule=rule, **whole)
    except TypeError:  # before jax 0.6 factors have no kinds
        partitioned.def_partition(partition, sharding_rule=rule)
    # GSPMD, the partitioner before Shardy, is not told the rule: it gathers, which is right too
    shardy = getattr(jax.config, "jax_use_shardy_partitioner", True)
    compute = partitioned if shardy else call

    @custom_vmap
    def batched(*args: Array) -> Arrays:
        return tuple(compute(*args))

    @batched.def_vmap
    def _(axis_size: int, is_mapped: list[bool], *args: Array) -> tuple[Arrays, tuple[bool, ...]]:
        folded = [
            x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, mapped in zip(args, is_mapped)
        ]
        batch = folded[0].shape[1]
        out = batched(*(x.reshape(axis_size * batch, *x.shape[2:]) for x in folded))
        return tuple(x.reshape(axis_size, batch, *x.shape[1:]) for x in out), (True,) * len(out)

    return batched
