"""Tensor parallel: the processes share the heads of every layer, and its hidden channels."""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from torch_rwkv6.nn import RWKV
from torch_rwkv6.nn.sharded import TENSOR_PARALLEL, own

_COLUMNS, _ROWS = ColwiseParallel(), RowwiseParallel()
_GATHERED = ColwiseParallel(output_layouts=Replicate())
_ENDS: dict[str, ParallelStyle] = {"emb": _GATHERED, "head": _GATHERED}
_LAYER: dict[str, ParallelStyle] = {
    "att.receptance": _COLUMNS,
    "att.key": _COLUMNS,
    "att.value": _COLUMNS,
    "att.gate": _COLUMNS,
    "att.output": _ROWS,
    "ffn.key": _COLUMNS,
    "ffn.receptance": _GATHERED,
    "ffn.value": _ROWS,
}


def share_heads(model: RWKV, mesh: DeviceMesh) -> None:
    """Gives each process some heads of every layer and some hidden channels of its channel mixing.

    Raises:
        TypeError: a matrix is held by another module than an nn.Linear.
        ValueError: the processes do not divide the number of heads or hidden channels, or embedding
            and head share one parameter.
    """
    size = mesh.size()
    _check(model, size)
    parallelize_module(model, mesh, _ENDS)
    # A plain tensor, as a compiled block needs: what comes from the processes is one that waits
    # for them when it is used.
    model.emb.register_forward_hook(lambda module, given, x: x.clone())
    for block in model.blocks:
        parallelize_module(block, mesh, _plan(block))
        att = block.att
        att.state_shape = (att.n_head // size, *att.state_shape[1:])
        att.ln_x.num_groups = att.n_head // size
    model.state_shape = model.blocks[0].att.state_shape
    distribute_module(model, mesh, _distribute)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = MethodType(_layer_norm, module)  # type: ignore[method-assign]
        if isinstance(module, nn.GroupNorm):
            module.forward = MethodType(_group_norm, module)  # type: ignore[method-assign]


def _plan(block: nn.Module) -> dict[str, ParallelStyle]:
    """How each matrix of a layer is cut, by its name."""
    there = {name for name, _ in block.named_modules()}  # the gate need not be
    return {name: style for name, style in _LAYER.items() if name in there}


def _check(model: RWKV, size: int) -> None:
    """Raises what `share_heads` does, before anything is changed."""
    if model.head.weight is model.emb.weight:
        raise ValueError(
            f"model: expected an emb.weight and a head.weight apart for the mesh's "
            f"{TENSOR_PARALLEL}, got one parameter that is both"
        )
    matrices = ["head"]
    for i, block in enumerate(model.blocks):
        matrices += [f"blocks.{i}.{name}" for name in _plan(block)]
    for name in matrices:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"model: expected torch.nn.Linear for the mesh's {TENSOR_PARALLEL}, got "
                f"{type(module).__module__}.{type(module).__name__} as {name}"
            )
    for block in model.blocks:
        for what, number in (("heads", block.att.n_head), ("n_ffn", block.ffn.key.out_features)):
            if number % size:
                raise ValueError(
                    f"mesh: {TENSOR_PARALLEL} = {size} processes do not share {number} {what} "
                    f"evenly: expected a size that divides {number}"
                )


# What norms compute, of plain tensors: activations are no DTensors.


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = own(norm.weight), own(norm.bias)
    return nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    weight, bias = own(norm.weight), own(norm.bias)
    return nn.functional.group_norm(x, norm.num_groups, weight, bias, norm.eps)


def _distribute(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Makes DTensors of the module's own parameters: those that have heads are cut over them."""
    along = getattr(module, "heads_along", {})
    if isinstance(module, nn.GroupNorm):
        along = {"weight": 0, "bias": 0}
    for name, p in list(module.named_parameters(recurse=False)):
        if not isinstance(p, DTensor):
            placement = Shard(along[name]) if name in along else Replicate()
            value = distribute_tensor(p.detach(), mesh, [placement])
            module.register_parameter(name, nn.Parameter(value, p.requires_grad))
