"""Gradient checkpointing: a block that the backward pass computes again, all but WKV."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from torch_rwkv6.contract import WKV, WKV4, WKV_CHECKPOINTED
from torch_rwkv6.nn.carry import call

__all__ = ["recomputed"]

# Whose results are kept: they take long to compute, and are no more than those of one matrix.
_KEPT = [operator.overload for operator in (WKV, WKV_CHECKPOINTED, WKV4)]


def recomputed(block: nn.Module, x: Tensor, *args: Any, **options: Any) -> list[Any]:
    """`torch_rwkv6.nn.carry.call`, which keeps no more for the backward pass than it is given."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _KEPT)
    with _without_cache(x.device.type):
        results: list[Any] = checkpoint(
            call, block, x, *args, use_reentrant=False, context_fn=contexts, **options
        )
    return results


def _without_cache(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it is, but for its cache of weights that earlier calls have cast.

    The backward pass begins without that cache and casts them again, while torch finds kept results
    by counting operations, which have to be the same both times.
    """
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, cache_enabled=False)
    return contextlib.nullcontext()
