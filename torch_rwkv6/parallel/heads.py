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
    RowwiseParallel,
    parallelize_module,
)

from torch_rwkv6.nn import RWKV
from torch_rwkv6.nn.sharded import TENSOR_PARALLEL, own


def share_heads(model: RWKV, mesh: DeviceMesh) -> None:
    """Gives each process some heads of every layer and some hidden channels of its channel mixing.

    Raises:
        ValueError: the processes do not divide the number of them.
    """
    size = mesh.size()
    for block in model.blocks:
        for what, number in (("heads", block.att.n_head), ("n_ffn", block.ffn.key.out_features)):
            if number % size:
                raise ValueError(
                    f"mesh: {TENSOR_PARALLEL} = {size} processes do not share {number} {what} "
                    f"evenly: expected a size that divides {number}"
                )
    columns, rows = ColwiseParallel(), RowwiseParallel()
    gathered = ColwiseParallel(output_layouts=Replicate())
    layer = {
        "att.receptance": columns,
        "att.key": columns,
        "att.value": columns,
        "att.gate": columns,
        "att.output": rows,
        "ffn.key": columns,
        "ffn.receptance": gathered,
        "ffn.value": rows,
    }
    ends = {"emb": RowwiseParallel(input_layouts=Replicate()), "head": gathered}
    parallelize_module(model, mesh, ends)
    # A plain tensor, as a compiled block needs: what comes from the processes is one that waits
    # for them when it is used.
    model.emb.register_forward_hook(lambda module, given, x: x.clone())
    for block in model.blocks:
        there = {name for name, _ in block.named_modules()}  # the gate need not be
        plan = {name: style for name, style in layer.items() if name in there}
        parallelize_module(block, mesh, plan)
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
