"""Every private name of torch that this package uses.

torch may rename them at any release: tests/test_torch_private.py says which of them the installed
one lacks.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.autograd.forward_ad
import torch.distributed.device_mesh
import torch.nn.modules.module
import torch.utils._pytree
from torch import Tensor

__all__ = [
    "after_inplace_or_view",
    "below_autograd",
    "below_inplace_or_view",
    "concrete",
    "dispatch_modes",
    "flat_mesh",
    "forward_mode_active",
    "global_forward_hooks",
    "has_kernel",
    "has_products_of",
    "joined_mesh",
    "register_namedtuple",
    "transforms_active",
]

# Contexts in which operators skip the kernels of autograd, and in the second one also those that
# count the versions of tensors changed in place.
below_autograd = torch._C._AutoDispatchBelowAutograd
below_inplace_or_view = torch._C._AutoDispatchBelowADInplaceOrView

# The dispatch keys after that of the version counter, for a kernel that redispatches from there.
after_inplace_or_view = torch._C._after_ADInplaceOrView_keyset

# Whether a transform of torch.func (grad, jvp, vmap, ...) is active.
transforms_active = torch._C._are_functorch_transforms_active

# The number of active modes that intercept every operator (FakeTensorMode, make_fx, ...).
dispatch_modes = torch._C._len_torch_dispatch_stack

# A namedtuple's name for torch.export.save.
register_namedtuple = torch.utils._pytree._register_namedtuple


# The dimensions of a mesh as one of a new name; meshes cut from one, side by side. Both None where
# torch was built without torch.distributed.
flat_mesh: Any = getattr(torch.distributed.device_mesh.DeviceMesh, "_flatten", None)
joined_mesh: Any = getattr(torch.distributed.device_mesh.DeviceMesh, "_concatenate", None)


def forward_mode_active() -> bool:
    """Whether forward-mode AD is active, inside of torch.autograd.forward_ad.dual_level."""
    return torch.autograd.forward_ad._current_level >= 0


def global_forward_hooks() -> bool:
    """Whether there are hooks on the calls of all modules (torch.nn.modules.module)."""
    return bool(
        torch.nn.modules.module._global_forward_hooks
        or torch.nn.modules.module._global_forward_pre_hooks
    )


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator, such as "rwkv6::wkv", has a kernel of its own for a dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


@functools.cache
def has_products_of(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype by instructions that this CPU has for it.

    Where oneDNN does not, torch multiplies bfloat16 and float16 many times slower than float32.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    supported = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype is torch.bfloat16
        else torch.ops.mkldnn._is_mkldnn_fp16_supported
    )
    return torch.backends.mkldnn.is_available() and bool(supported())


def concrete(x: Any) -> Tensor | None:
    """The tensor inside torch.func.grad's wrapper; None for a tensor of vmap, without values."""
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return None if torch._C._functorch.is_batchedtensor(x) else x
