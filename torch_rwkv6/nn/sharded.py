"""Modules and parameters on several devices: modules of fully_shard, and DTensors.

Modules that are not sharded come through here as well, so nothing of torch.distributed is imported,
which would take seconds: where its parts have not been imported yet, nothing can be sharded.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

__all__ = ["device_of", "is_sharded", "whole", "write"]


def is_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was applied to the module, whose calls may then cast tensors."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _is_dtensor(x: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def device_of(parameter: Tensor) -> torch.device:
    """The device on which the parameter is used."""
    if _is_dtensor(parameter):  # its memory may be on the CPU meanwhile
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        return torch.empty(0, device=mesh.device_type).device  # with the index of this process
    return parameter.device


def whole(parameter: Tensor) -> Tensor:
    """The parameter as a plain tensor, through which its gradient flows.

    Every process of a sharded parameter's mesh has to call it.
    """
    return parameter.full_tensor() if _is_dtensor(parameter) else parameter  # type: ignore[attr-defined]


@torch.no_grad()
def write(
    parameter: Tensor,  # any shape
    value: Tensor,  # the whole of it, of any dtype and device
) -> None:
    """Writes the value to the parameter. A sharded one takes that of the mesh's first process."""
    if _is_dtensor(parameter):
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        value = value.to(mesh.device_type, parameter.dtype)
        distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
        value = distribute(value, mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)
