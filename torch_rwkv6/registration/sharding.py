"""Sharding rules for torch.distributed.tensor: each process computes some heads or some sequences.

A tensor is cut along the axis that the operator computes independently, or along that of the
sequences; it is whole where it has no such axis, and its gradient is then a sum over the processes
(Partial). Several mesh dimensions may cut both, each one of them. Nothing cuts the tokens: every
token needs the state that those before it leave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_rwkv6._after_import import after_import
from torch_rwkv6.contract import OPERATORS, Argument, Operator

# The placements of all results and of all arguments, on one dimension of a mesh.
Rule = tuple[list[Any], list[Any]]


def _axes(operator: Operator, given: dict[str, Any]) -> list[str]:
    """The axes that may be cut; those in one string are cut together."""
    forward = operator.forward or operator
    ways = [operator.independent] if operator.independent else []
    if given.get("cu_seqlens") is None:  # packed sequences are one row of tokens
        lead, state = given[forward.arguments[0].name], given.get("initial_state")
        # Each sequence has a state of its own, or all processes need all states.
        own = (
            state is not None and given.get("state_map") is None and state.shape[0] == lead.shape[0]
        )
        ways.append("BMS" if own else "BM")
    # Inputs may be whole, but not what the forward pass makes of them, nor its gradient.
    made = operator.results
    if operator.forward is not None:
        made = operator.arguments[: -len(forward.arguments)]
    return [axes for axes in ways if all(set(a.axes) & set(axes) for a in made)]


def _rules(operator: Operator) -> Callable[..., list[Rule]]:
    """What register_sharding asks: the ways to place the arguments of a call and its results."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def place(tensor: Argument, axes: str, otherwise: Any) -> Any:
        cut = [dim for dim, axis in enumerate(tensor.axes) if axis in axes]
        return Shard(cut[0]) if cut else otherwise

    def rules(*arguments: Any) -> list[Rule]:
        given = operator.named(arguments)
        _refuse(operator, given)
        # The gradient of an optional input that is not given is empty.
        absent = {f"grad_{name}" for name, spec in given.items() if spec is None}
        takes = [a for a in operator.arguments if given[a.name] is not None]
        found: list[Rule] = [
            ([Replicate()] * len(operator.results), [Replicate()] * len(takes)),
        ]
        for axes in _axes(operator, given):
            results = [
                Replicate() if a.name in absent else place(a, axes, Partial())
                for a in operator.results
            ]
            found.append((results, [place(a, axes, Replicate()) for a in takes]))
        return found

    return rules


def _refuse(operator: Operator, given: dict[str, Any]) -> None:
    """Raises where a tensor is updated in place, or an input is cut between tokens."""
    if operator.mutated:
        raise RuntimeError(
            f"rwkv6::{operator.name} updates its state in place and takes no DTensor: call it with "
            "each process's own tensors (x.to_local()), all of the same heads and sequences"
        )
    for argument in (operator.forward or operator).arguments:
        spec, tokens = given[argument.name], argument.axes.find("T")
        if tokens >= 0 and any(placement.is_shard(tokens) for placement in spec.placements):
            raise RuntimeError(
                f"{argument.name}: expected every process to have all tokens, got a DTensor "
                f"sharded along T (placements {tuple(spec.placements)}). Redistribute it along "
                "another dimension first, or let each process call torch_rwkv6.parallel.wkv with "
                "its own piece (x.to_local())"
            )


def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for operator in OPERATORS:
        register_sharding(operator.overload)(_rules(operator))


after_import("torch.distributed.tensor", _register)
