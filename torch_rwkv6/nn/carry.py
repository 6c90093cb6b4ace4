"""How a state reaches a module and comes back: through its ``__call__``, and in float32.

Passing a state as ``module(x, state)`` has two problems. Inference updates it in place, which a
user's own module need not support. And a wrapper may cast the arguments: FSDP2's mixed precision
rounds every floating-point tensor that enters or leaves a module, and the rounding errors of a
state add up from call to call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_rwkv6.nn.sharded import is_sharded

__all__ = ["Carried", "box_for", "call", "packed", "stateful", "takes_update", "to_update"]

Forward = TypeVar("Forward", bound=Callable[..., Any])


class Carried:
    """A box that carries a state through a sharded module's ``__call__``.

    Wrappers cast tensors in tuples, dictionaries and other pytrees, but not inside this object.

    Attributes:
        state: what the module is given.
        new: what it returned in place of it, once it has run.
    """

    __slots__ = ("new", "state")

    def __init__(self, state: Any) -> None:
        self.state, self.new = state, None

    def take(self, returned: Any) -> Any:
        """The new state; if the module put none in here, ``returned``, which may have been cast."""
        # Taken out, because activation checkpointing keeps the arguments as long as the graph.
        new, self.new = self.new, None
        return returned if new is None else new


def stateful(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that has ``update`` and finds its state in a `Carried` as well.

    Where the state is among the arguments, the new one is among the results.
    """

    @functools.wraps(forward)
    def opening(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for i, box in enumerate(args):
            if isinstance(box, Carried):
                results = forward(self, *args[:i], box.state, *args[i + 1 :], **kwargs)
                box.new = results[i]
                return results
        return forward(self, *args, **kwargs)

    opening.takes_update = True  # type: ignore[attr-defined]
    return opening


def takes_update(module: nn.Module) -> bool:
    """Whether the module's forward, which may have been replaced, has the argument ``update``."""
    return getattr(module.forward, "takes_update", False)


def packed(forward: Forward) -> Forward:
    """A forward that has the argument ``cu_seqlens``."""
    forward.takes_cu_seqlens = True  # type: ignore[attr-defined]
    return forward


def box_for(module: nn.Module, state: Any) -> Carried | None:
    """A box for the state, where a wrapper may cast what the module is given and it opens boxes.

    A forward that somebody else wrote is given the state as it is, unless it overrides one of ours,
    which it may call.
    """
    if not is_sharded(module):
        return None
    forwards = (kind.__dict__.get("forward") for kind in type(module).__mro__)
    opens = any(getattr(forward, "takes_update", False) for forward in forwards)
    return Carried(state) if opens else None


def to_update(*states: Tensor | None) -> tuple[Tensor, ...]:
    """The states that a call with ``update`` was given.

    Raises:
        TypeError: one of them is missing.
    """
    found = tuple(x for x in states if x is not None)
    if len(found) < len(states):
        raise TypeError("update: expected every shift and state, to be updated, got None")
    return found


def call(
    module: nn.Module,
    x: Tensor,  # [B, T, D]
    *states: Tensor | None,  # [B, ...] each; of a block or a time mixing, the second is float32
    update: bool,
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> list[Any]:
    """``module(x, *states)``: its output and the new states, as a list.

    Args:
        module: a block, a time mixing or a channel mixing, or what has taken its place.
        update: the new states are written to the memory of the old ones, and those are returned.
        cu_seqlens: of packed sequences. A module whose forward does not take it (RWKV-4's time
            mixing; one that somebody else wrote) is called for one sequence after the other.

    Raises:
        TypeError: there is no state to update.
    """
    options: dict[str, Any] = {}
    if cu_seqlens is not None:
        if not getattr(module.forward, "takes_cu_seqlens", False):
            return _one_by_one(module, x, *states, update=update, cu_seqlens=cu_seqlens)
        options["cu_seqlens"] = cu_seqlens
    olds = to_update(*states) if update else ()
    box = box_for(module, states[1]) if len(states) > 1 else None
    given = states if box is None else (states[0], box, *states[2:])
    if update and takes_update(module):
        options["update"] = True
    results = list(module(x, *given, **options))
    if box is not None:
        results[2] = box.take(results[2])
    for i, old in enumerate(olds, 1):
        if results[i] is not old:
            results[i] = old.copy_(results[i])
    return results


def _one_by_one(
    module: nn.Module,
    x: Tensor,  # [1, T, D]
    *states: Tensor | None,  # [M, ...] each
    update: bool,
    cu_seqlens: Tensor,  # [M + 1]
) -> list[Any]:
    """`call` of each packed sequence alone."""
    results = []
    for m, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        own = (None if s is None else s[m : m + 1] for s in states)
        results.append(call(module, x[:, begin:end], *own, update=update))
    y, *new = zip(*results, strict=True)
    return [torch.cat(y, 1), *(states if update else map(torch.cat, new))]
