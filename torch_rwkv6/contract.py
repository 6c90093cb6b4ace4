"""The operators' contract as data: the tensors that each operator takes and returns, in order.

The schemas, fake implementations, fallback kernels, autograd, autocast and vmap rules and most
checks follow from this table, so a new argument is added here, in `ops` and in `reference`.
csrc/bindings/torch.cpp holds the same schemas for programs that run without Python.

Shapes are written with one letter per axis: B sequences of T tokens, H heads of N channels, D
channels, S states. M is the number of sequences, which is B unless they are packed by cu_seqlens.
P is the number of rows for checkpoints.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_HEAD_SIZE = 256
CHECKPOINT_TOKENS = 128  # from one checkpoint to the next, as in csrc/include/rwkv6.h


def state_dtype(r: Tensor) -> torch.dtype:
    """The dtype that operators compute in, and keep states in, for inputs of r's dtype."""
    return torch.float64 if r.dtype == torch.float64 else torch.float32


class Dtype(enum.Enum):
    """The dtypes that a tensor may have, given the operator's first input."""

    FLOAT = enum.auto()  # that of the first input itself
    SAME = enum.auto()
    SAME_OR_FLOAT32 = enum.auto()
    STATE = enum.auto()
    STATE_OR_SAME = enum.auto()
    FLOAT32 = enum.auto()
    INT8 = enum.auto()
    INDEX = enum.auto()

    def allowed(self, first: Tensor) -> tuple[torch.dtype, ...]:
        """The dtypes that are allowed beside this first input; results have the first of them."""
        return {
            Dtype.FLOAT: FLOAT_DTYPES,
            Dtype.SAME: (first.dtype,),
            Dtype.SAME_OR_FLOAT32: (first.dtype, torch.float32),
            Dtype.STATE: (state_dtype(first),),
            Dtype.STATE_OR_SAME: (state_dtype(first), first.dtype),
            Dtype.FLOAT32: (torch.float32,),
            Dtype.INT8: (torch.int8,),
            Dtype.INDEX: INDEX_DTYPES,
        }[self]


@dataclass(frozen=True)
class Argument:
    """A tensor that an operator takes or returns."""

    name: str
    axes: str  # one letter each; a digit is the size itself
    dtype: Dtype
    optional: bool = False
    mutated: bool = False
    hint: str = ""  # what an error about the shape says besides

    @property
    def shape_name(self) -> str:
        return f"[{', '.join(self.axes)}]"


@dataclass(frozen=True)
class Operator:
    """What torch must know about an operator."""

    name: str
    arguments: tuple[Argument, ...]
    results: tuple[Argument, ...]
    # Entries along this axis are computed independently; torch.vmap adds its own to them.
    independent: str = ""
    autocast: bool = False  # has a rule for mixed precision
    forward: Operator | None = None  # the operator whose gradients this one computes
    update_of: Operator | None = None  # the operator that this one is the in-place form of
    # The operator that this one is, with more results for the backward. Autograd alone runs it,
    # where it has a kernel, so it needs no implementation in PyTorch.
    checkpointed_of: Operator | None = None

    @property
    def schema(self) -> str:
        """The schema without the name, as TORCH_LIBRARY reads it."""
        default = "" if self.forward else "=None"
        takes = (
            f"Tensor? {a.name}{default}"
            if a.optional
            else f"Tensor(a!) {a.name}"
            if a.mutated
            else f"Tensor {a.name}"
            for a in self.arguments
        )
        gives = ["Tensor" if self.forward else f"Tensor {a.name}" for a in self.results]
        result = f"({', '.join(gives)})" if len(gives) > 1 else "Tensor"
        return f"({', '.join(takes)}) -> {result}"

    @property
    def overload(self) -> Any:
        """The registered operator."""
        return getattr(torch.ops.rwkv6, self.name).default

    @property
    def differentiable(self) -> tuple[int, ...]:
        """The positions of the arguments that have a gradient: all but the index tensors."""
        return tuple(i for i, a in enumerate(self.arguments) if a.dtype is not Dtype.INDEX)

    @property
    def mutated(self) -> tuple[int, ...]:
        """The positions of the arguments that are updated in place."""
        return tuple(i for i, a in enumerate(self.arguments) if a.mutated)

    def complete(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with the optional ones that a call leaves out at its end."""
        return *arguments, *(None,) * (len(self.arguments) - len(arguments))

    def named(self, arguments: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip([a.name for a in self.arguments], self.complete(arguments), strict=True))


def _backward(forward: Operator, *kept: Argument) -> Operator:
    """Takes a gradient of each result, each may be None, and the inputs; returns their gradients.

    Between them it takes what the forward has kept for it. The gradient of an optional input that
    is not given is empty: [0], float32.
    """
    grads = [dataclasses.replace(a, name=f"grad_{a.name}", optional=True) for a in forward.results]
    inputs = forward.arguments
    results = [
        dataclasses.replace(inputs[i], name=f"grad_{inputs[i].name}")
        for i in forward.differentiable
    ]
    return Operator(
        f"{forward.name}{'_checkpointed' if kept else ''}_backward",
        (*grads, *(dataclasses.replace(a, optional=True) for a in kept), *inputs),
        tuple(results),
        forward.independent,
        forward=forward,
    )


def _update(forward: Operator) -> Operator:
    """The same with a state that is read and updated in place."""
    arguments = (
        dataclasses.replace(a, name="state", dtype=Dtype.STATE, optional=False, mutated=True)
        if a.name == "initial_state"
        else a
        for a in forward.arguments
    )
    return dataclasses.replace(
        forward,
        name=f"{forward.name}_update",
        arguments=tuple(arguments),
        results=forward.results[:1],
        update_of=forward,
    )


WKV = Operator(
    "wkv",
    (
        Argument("r", "BTHN", Dtype.FLOAT, hint=" (view [B, T, C] as [B, T, C // N, N] first)"),
        Argument("k", "BTHN", Dtype.SAME),
        Argument("v", "BTHN", Dtype.SAME),
        Argument("w", "BTHN", Dtype.SAME_OR_FLOAT32),
        Argument("u", "HN", Dtype.SAME_OR_FLOAT32),
        Argument(
            "initial_state", "SHNN", Dtype.STATE_OR_SAME, optional=True, hint=" ([key, value])"
        ),
        Argument("state_map", "M", Dtype.INDEX, optional=True),
        Argument("cu_seqlens", "M", Dtype.INDEX, optional=True),  # M + 1 offsets
    ),
    (Argument("y", "BTHN", Dtype.SAME), Argument("final_state", "MHNN", Dtype.STATE)),
    independent="H",
    autocast=True,
)
WKV_BACKWARD = _backward(WKV)
# The final state alone, which does not depend on r and u: less work than a forward, for
# sequences that are cut into pieces (torch_rwkv6.parallel).
WKV_FINAL_STATE = Operator(
    "wkv_final_state",
    (
        dataclasses.replace(WKV.arguments[0], name="k"),
        *(a for a in WKV.arguments if a.name not in ("r", "k", "u")),
    ),
    WKV.results[1:],
    independent="H",
)
# What autograd runs where there are kernels: the forward keeps some of the states that it passes
# through, and the backward need not find them again.
CHECKPOINTS = Argument("checkpoints", "PHNN", Dtype.STATE)
WKV_CHECKPOINTED = dataclasses.replace(
    WKV,
    name="wkv_checkpointed",
    results=(*WKV.results, CHECKPOINTS),
    autocast=False,
    checkpointed_of=WKV,
)
WKV_CHECKPOINTED_BACKWARD = _backward(WKV, CHECKPOINTS)
WKV_UPDATE = _update(WKV)

WKV4 = Operator(
    "wkv4",
    (
        Argument("k", "BTD", Dtype.FLOAT),
        Argument("v", "BTD", Dtype.SAME),
        Argument("w", "D", Dtype.SAME_OR_FLOAT32),
        Argument("u", "D", Dtype.SAME_OR_FLOAT32),
        Argument("initial_state", "B3D", Dtype.STATE, optional=True),
    ),
    (Argument("y", "BTD", Dtype.SAME), Argument("final_state", "B3D", Dtype.STATE)),
    independent="D",
)
WKV4_BACKWARD = _backward(WKV4)
WKV4_UPDATE = _update(WKV4)

MATVEC = Operator(
    "matvec",
    (Argument("x", "MK", Dtype.FLOAT), Argument("weight", "NK", Dtype.SAME)),
    (Argument("y", "MN", Dtype.SAME),),
)
MATVEC_INT8 = Operator(
    "matvec_int8",
    (
        Argument("x", "MK", Dtype.FLOAT),
        Argument("weight", "NK", Dtype.INT8),
        Argument("scale", "N", Dtype.FLOAT32),
    ),
    (Argument("y", "MN", Dtype.SAME),),
)

OPERATORS = (
    *(WKV, WKV_BACKWARD, WKV_UPDATE, WKV_FINAL_STATE),
    *(WKV_CHECKPOINTED, WKV_CHECKPOINTED_BACKWARD),
    *(WKV4, WKV4_BACKWARD, WKV4_UPDATE),
    *(MATVEC, MATVEC_INT8),
)

# Operators and what computes their gradients.
DERIVATIVES = (
    (WKV, WKV_BACKWARD),
    (WKV_CHECKPOINTED, WKV_CHECKPOINTED_BACKWARD),
    (WKV4, WKV4_BACKWARD),
)

# The operator of eager decoding on a CPU has no derivative, no fake implementation and no fallback:
# torch_rwkv6/nn/decode.py alone calls it.
DECODE_LAYER = (
    "(Tensor x, Tensor(a!) att_shift, Tensor(b!) wkv, Tensor(c!) ffn_shift, "
    "Tensor[] parameters, Tensor[] scales, float ln_eps, float ln_x_eps) -> Tensor"
)

SCHEMAS = {o.name: o.schema for o in OPERATORS} | {"decode_layer": DECODE_LAYER}
