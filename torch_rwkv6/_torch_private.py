"""Every private name of torch that this package uses.

torch may rename them at any release: tests/test_torch_private.py says which of them the installed
one lacks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad
import torch.nn.modules.module
import torch.utils._pytree
from torch import Tensor

__all__ = [
    "after_inplace_or_view",
    "below_autograd",
    "below_inplace_or_view",
    "concrete",
    "dispatch_modes",
    "forward_mode_active",
    "global_forward_hooks",
    "has_kernel",
    "register_namedtuple",
    "transforms_active",
]

# Contexts in which calls of operators skip the kernels of autograd; the second one also those that
# count the versions of what is changed in place.
below_autograd = torch._C._AutoDispatchBelowAutograd
below_inplace_or_view = torch._C._AutoDispatchBelowADInplaceOrView

# The dispatch keys behind that of the version counter, for a kernel that goes on from there.
after_inplace_or_view = torch._C._after_ADInplaceOrView_keyset

# Whether torch.func's grad, jvp, vmap and so on are at work.
transforms_active = torch._C._are_functorch_transforms_active

# How many modes see every operator first: FakeTensorMode, make_fx, FlopCounterMode and the like.
dispatch_modes = torch._C._len_torch_dispatch_stack

# A namedtuple's name for torch.export.save.
register_namedtuple = torch.utils._pytree._register_namedtuple


def forward_mode_active() -> bool:
    """Whether forward-mode AD is at work, inside of torch.autograd.forward_ad.dual_level."""
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


def concrete(x: Any) -> Tensor | None:
    """The tensor that torch.func.grad wraps; None for what has no values of its own, as in vmap."""
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return None if torch._C._functorch.is_batchedtensor(x) else x
