"""Gradient checkpointing: a block that the backward pass computes again, all but WKV."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from torch_rwkv6.contract import WKV, WKV4, WKV_CHECKPOINTED
from torch_rwkv6.nn.carry import call

__all__ = ["recomputed"]

# Whose results are kept: they take long to compute, and are no more than those of one matrix.
_KEPT = [operator.overload for operator in (WKV, WKV_CHECKPOINTED, WKV4)]


def recomputed(*args: Any, **options: Any) -> list[Any]:
    """`torch_rwkv6.nn.carry.call`, which keeps no more for the backward pass than it is given."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _KEPT)
    results: list[Any] = checkpoint(
        call, *args, use_reentrant=False, context_fn=contexts, **options
    )
    return results
