"""WKV on JAX: the kernel library as an XLA custom call, under every transform.

Forward and backward are each ``custom_vmap(custom_partitioning(ffi_call))``, in this order because
custom_partitioning has no batching rule; custom_vjp around them ties them together. Every operand
of the custom call leads with the batch, u too. So vmap folds into the batch, a mesh may cut batch
and heads of all operands alike, and the gradient of u is summed by the broadcast's own transpose.
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
from jax.sharding import NamedSharding, PartitionSpec

from keras_adapter import _library
from keras_adapter.backends import chunked

Array = Any
Arrays = tuple[Array, ...]

TOKENS, HEADS, STATES, ROWS = "b t h n", "b h n", "b h n m", "b"  # the operands' dimensions


def _register() -> frozenset[str]:
    """Registers the custom calls. Returns the names of the backends that can run them."""
    binding = _library.load()
    if binding is None:
        return frozenset()
    suffixes = {"cpu": ""}
    if _library.has_cuda_kernels(binding):
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
    if _is_native():
        return _native(r, k, v, w, u, initial_state, state_map)
    return chunked.wkv(r, k, v, w, u, initial_state, state_map)


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
    # wide, as the gradients of u of all batch rows are yet to be added up
    u = jnp.broadcast_to(u.astype(_state_dtype(r)), (batch, heads, size))
    operands = [r, k, v, w, u]
    states = 0
    if initial_state is not None:
        initial_state = initial_state.astype(_state_dtype(r))
        if state_map is None:
            initial_state = jnp.broadcast_to(initial_state, (batch, heads, size, size))
            operands.append(initial_state)
        else:
            # out of range: an error of the custom call on the CPU; on a GPU, where nobody looks at
            # the entry, NaN
            states, state_map = initial_state.shape[0], state_map.astype(jnp.int32)
            valid = ((state_map >= 0) & (state_map < states))[:, None, None, None]
            chosen = jnp.take(initial_state, state_map, axis=0, mode="clip")
            operands += [jnp.where(valid, chosen, jnp.nan), state_map]
    return _operator(len(operands), states)(*_varying_alike(tuple(operands)))


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

    def wkv_backward(operands: Arrays, grads: Arrays) -> Arrays:
        found = backward(*_varying_alike((*grads, *operands)))
        return (*found, None)[:count] if count == 7 else found

    def backward_backward(operands: Arrays, grads: Arrays) -> Arrays:
        # the second derivative and beyond: through the high-level implementation
        floats, index = operands[: 2 + min(count, 6)], operands[2 + min(count, 6) :]
        _, vjp = jax.vjp(_high_level_backward, *floats)
        return (*vjp(grads), *(None for _ in index))

    wkv.defvjp(lambda *operands: (wkv(*operands), operands), wkv_backward)
    backward.defvjp(lambda *operands: (backward(*operands), operands), backward_backward)
    return wkv


def _state_dtype(r: Array) -> Any:
    return jnp.float64 if r.dtype == jnp.float64 else jnp.float32


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
            jax.ShapeDtypeStruct((batch, heads, size, size), _state_dtype(r)),
        ),
        # the state is updated in place where nobody needs the old one
        input_output_aliases={5: 1} if len(operands) > 4 else {},
    )
    return _vary_like(r, call(r, *operands, states=np.int64(states)))


def _call_backward(
    grad_y: Array,  # [B, T, H, N]
    grad_final_state: Array,  # [B, H, N, N]
    *operands: Array,  # r, k, v, w, u, perhaps state and state_map
    states: int,
) -> Arrays:
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:6])
    call = jax.ffi.ffi_call(_library.BACKWARD, results)
    found = call(grad_y, grad_final_state, *operands, states=np.int64(states))
    return _vary_like(grad_y, found)


def _high_level_backward(
    grad_y: Array,  # [B, T, H, N]
    grad_final_state: Array,  # [B, H, N, N]
    *floats: Array,  # r, k, v, w, u [B, H, N], perhaps state
) -> Arrays:
    def forward(r: Array, k: Array, v: Array, w: Array, u: Array, *state: Array) -> Arrays:
        return chunked.wkv(r, k, v, w, u[:, None], *state)

    _, vjp = jax.vjp(forward, *floats)
    return tuple(vjp((grad_y, grad_final_state)))


def _batched(
    call: Callable[..., Arrays], operands: tuple[str, ...], results: tuple[str, ...]
) -> Callable[..., Arrays]:
    """`call` with rules for meshes and for vmap; the dimensions of its operands and results."""
    partitioned = custom_partitioning(lambda *args: call(*args))

    def shardings(mesh: Any, dims: tuple[str, ...], axes: dict[str, Any]) -> tuple[Any, ...]:
        # t, n and m are whole on every device, whatever was suggested
        specs = (PartitionSpec(*(axes.get(d) for d in x.split())) for x in dims)
        return tuple(NamedSharding(mesh, spec) for spec in specs)

    def partition(mesh: Any, args: Any, out: Any) -> Any:
        axes = _batch_and_head_axes(mesh, (*zip(operands, args), *zip(results, out)))
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
        folded = (
            x if mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, mapped in zip(args, is_mapped)
        )
        out = batched(*(x.reshape(-1, *x.shape[2:]) for x in folded))
        return tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

    return batched


def _batch_and_head_axes(mesh: Any, tensors: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The mesh axes that cut b and h: those of the first tensor that is cut there at all.

    tensors: dimensions, and shape with sharding, of each.
    """
    axes: dict[str, Any] = {}
    used: set[str] = set()
    for dims, x in tensors:
        spec = getattr(x.sharding, "spec", ())
        for dim, names, size in zip(dims.split(), spec, x.shape):
            names = (names,) if isinstance(names, str) else tuple(names or ())
            devices = int(np.prod([mesh.shape[name] for name in names]))
            if dim not in "bh" or dim in axes or not names or used & set(names) or size % devices:
                continue
            axes[dim] = names
            used |= set(names)
    return axes


def _varying_alike(operands: Arrays) -> Arrays:
    """Inside shard_map with varying-axes checks: all operands vary over the same mesh axes."""
    every = frozenset[str]().union(*map(_varying_axes, operands))
    return tuple(_vary(x, every) for x in operands)


def _vary_like(operand: Array, results: Any) -> Arrays:
    """The results of a custom call, which knows nothing of mesh axes, vary as its operands do."""
    return tuple(_vary(x, _varying_axes(operand)) for x in results)


def _varying_axes(x: Array) -> frozenset[str]:
    aval = jax.typeof(x) if hasattr(jax, "typeof") else None
    # the attribute's name has changed over jax's versions
    varying = getattr(getattr(aval, "manual_axis_type", None), "varying", None)
    return frozenset(varying or getattr(aval, "vma", None) or ())


def _vary(x: Array, axes: frozenset[str]) -> Array:
    new = tuple(sorted(axes - _varying_axes(x)))
    if not new:
        return x
    return (
        jax.lax.pcast(x, new, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, new)
    )
