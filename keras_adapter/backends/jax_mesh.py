"""WKV on JAX's meshes: which axes shard batch and heads, and how JAX's types express it.

Explicit axes are part of an array's type, as are the axes that it varies over inside shard_map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Array = Any
Arrays = tuple[Array, ...]

TOKENS, HEADS, STATES, ROWS = "b t h n", "b h n", "b h n m", "b"  # dimensions


def with_auto_axes(wkv: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """`wkv` that also takes arrays on explicit axes, which are treated as axes of type Auto inside.

    The results are sharded like the first operand that is sharded over batch or heads.
    """

    @functools.wraps(wkv)
    def on_any_mesh(*operands: Array | None) -> Arrays:
        given = tuple(x for x in operands if x is not None)
        mesh = _explicit_mesh(given)
        if mesh is None:
            return wkv(*operands)

        def of_given(*given: Array) -> Arrays:
            rest = iter(given)
            return wkv(*(None if x is None else next(rest) for x in operands))

        # u [H, N], initial_state [S, H, N, N] with any S, state_map [B]
        dims = (*(TOKENS,) * 4, "h n", "s h n m", ROWS)
        tensors = tuple((d, jax.typeof(x)) for d, x in zip(dims, operands) if x is not None)
        axes = batch_and_head_axes(mesh, tensors)
        out = tuple(named_sharding(mesh, d, axes) for d in (TOKENS, STATES))
        call = jax.sharding.auto_axes(of_given, axes=mesh.explicit_axes, out_sharding=out)
        return tuple(call(*given))

    return on_any_mesh


def _explicit_mesh(operands: Arrays) -> Any | None:
    """The mesh whose explicit axes are in the operands' types."""
    if not hasattr(jax.sharding, "auto_axes") or not hasattr(jax, "typeof"):
        return None
    for x in operands:
        mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
        if mesh is not None and mesh.explicit_axes:
            return mesh
    return None


def named_sharding(mesh: Any, dims: str, axes: dict[str, Any]) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(axes.get(d) for d in dims.split())))


def batch_and_head_axes(mesh: Any, tensors: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The mesh axes that shard b and h: those of the first tensor that is sharded there.

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


def varying_alike(operands: Arrays, axes: tuple[str, ...] = ()) -> Arrays:
    """Inside shard_map with varying-axes checks: all operands vary over the same mesh axes.

    axes: some that are among them.
    """
    every = frozenset(axes).union(*map(_varying_axes, operands))
    return tuple(_vary(x, every) for x in operands)


def vary_like(operand: Array, results: Any) -> Arrays:
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
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, new, to="varying")
    return jax.lax.pvary(x, new) if hasattr(jax.lax, "pvary") else x
