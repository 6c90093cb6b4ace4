"""Modules and parameters on several devices: modules of fully_shard, and DTensors.

Modules that are not sharded come through here as well, so nothing of torch.distributed is imported,
which would take seconds: where its parts have not been imported yet, nothing can be sharded.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TENSOR_PARALLEL", "device_of", "entering", "is_dtensor", "is_sharded", "own", "write"]

TENSOR_PARALLEL = "tp"  # the dimension of a mesh whose processes share the heads of each layer


def is_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was applied to the module, whose calls may then cast tensors."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_dtensor(x: Tensor) -> bool:
    """Whether the tensor is spread over the processes of a mesh."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def device_of(parameter: Tensor) -> torch.device:
    """The device on which the parameter is used."""
    if is_dtensor(parameter):  # its memory may be on the CPU meanwhile
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        return torch.empty(0, device=mesh.device_type).device  # with the index of this process
    return parameter.device


def own(parameter: Tensor) -> Tensor:
    """What this process computes with, as a plain tensor through which the gradient flows.

    That is the whole parameter, or this process's heads of it under tensor parallelism. Every
    process of a sharded parameter's mesh has to call it.
    """
    if not is_dtensor(parameter):
        return parameter
    sharded: Any = parameter
    replicate = sys.modules["torch.distributed.tensor"].Replicate()
    names = sharded.device_mesh.mesh_dim_names or (None,) * sharded.device_mesh.ndim
    placements = tuple(
        placement if name == TENSOR_PARALLEL else replicate
        for name, placement in zip(names, sharded.placements, strict=True)
    )
    if placements != sharded.placements:
        sharded = sharded.redistribute(placements=placements)
    return sharded.to_local()


def entering(x: Tensor, parameter: Tensor) -> Tensor:
    """x for a product with `own(parameter)`, of which each process has other columns.

    All processes have the same x, and its gradient is the sum of what they find.
    """
    if not is_dtensor(parameter):
        return x
    tensor = sys.modules["torch.distributed.tensor"]
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    same = tensor.DTensor.from_local(x, mesh, [tensor.Replicate()] * mesh.ndim, run_check=False)
    return same.to_local(grad_placements=[tensor.Partial()] * mesh.ndim)


@torch.no_grad()
def write(
    parameter: Tensor,  # any shape
    value: Tensor,  # the whole of it, of any dtype and device
) -> None:
    """Writes the value to the parameter. A sharded one takes that of the mesh's first process."""
    if is_dtensor(parameter):
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        value = value.to(mesh.device_type, parameter.dtype)
        distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
        # Not straight to the placements, which need not divide the sizes evenly.
        value = distribute(value, mesh).redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)
