"""Inputs for contenders, the exact results in float64, and the errors of results."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from benchmarks.work import GRADIENTS, Arrays, Work
from torch_rwkv6 import reference

EXTREME_DECAYS = (5.0, 10.0, 20.0, 90.0, -1e9)
SEGMENT = 256  # tokens


def make_inputs(work: Work, seed: int = 0) -> Arrays:
    """r, k, v, w, grad_y [B, T, H, N], u [H, N], state [B, H, N, N], float32.

    N(0, 1), w ~ N(-2, 1); rounded to the work's dtype where it is a narrower one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shape = (work.B, work.T, work.H, work.N)
    x = {name: normal(*shape) for name in ("r", "k", "v", "w", "grad_y")}
    x["w"] -= 2
    if work.extreme:
        place = torch.rand(shape, generator=generator)
        for i, value in enumerate(EXTREME_DECAYS):
            x["w"][(place >= i / 100) & (place < (i + 1) / 100)] = value
    x["u"] = normal(work.H, work.N)
    if work.dtype != "float32":
        x = {name: a.to(getattr(torch, work.dtype)).float() for name, a in x.items()}
    x["state"] = normal(work.B, work.H, work.N, work.N)
    return {name: a.numpy() for name, a in x.items()}


def checked_heads(work: Work) -> list[int]:
    """The first and the last two heads: heads are independent of each other."""
    return sorted({h % work.H for h in (0, 1, -2, -1)} if work.H > 1 else {0})


def of_heads(arrays: Mapping[str, np.ndarray], heads: list[int]) -> Arrays:
    """The same arrays with these heads only."""
    axis = {"u": 0, "grad_u": 0, "state": 1, "grad_state": 1}
    return {name: np.take(a, heads, axis.get(name, 2)) for name, a in arrays.items()}


@torch.no_grad()
def exact(work: Work, inputs: Arrays) -> Arrays:
    """The results of the work by the recurrence in float64, for `checked_heads`.

    In segments, so that no more than one segment's states are in memory.
    """
    some = of_heads(inputs, checked_heads(work))
    x = {name: torch.from_numpy(a).double() for name, a in some.items()}
    u, state = x["u"], x["state"]
    names = ("r", "k", "v", "w", "grad_y")
    segments = list(zip(*(x[name].split(SEGMENT, 1) for name in names), strict=True))
    starts, outputs = [], []
    for *tokens, _ in segments:
        starts.append(state)
        y, state = reference.recurrence(*tokens, u, state)
        outputs.append(y)
    if work.kind in ("forward", "decode"):
        return {"y": torch.cat(outputs, 1).numpy(), "state": state.numpy()}
    grads, grad_u, grad_state = [], torch.zeros_like(u), torch.zeros_like(state)
    for (*tokens, grad_y), start in zip(reversed(segments), reversed(starts), strict=True):
        *grad, grad_u_here, grad_state = reference.recurrence_backward(
            grad_y, grad_state, *tokens, u, start
        )
        grads.append(grad)
        grad_u = grad_u + grad_u_here
    whole = [torch.cat(parts, 1) for parts in zip(*reversed(grads), strict=True)]
    results = (*whole, grad_u, grad_state)
    return {name: a.numpy() for name, a in zip(GRADIENTS, results, strict=True)}


def relative_error(found: Arrays, expected: Arrays) -> float:
    """The largest relative RMS error of the tensors; NaN if one contains a NaN."""
    errors = []
    for name, right in expected.items():
        difference = np.linalg.norm((found[name].astype(np.float64) - right).ravel())
        errors.append(float(difference / max(np.linalg.norm(right.ravel()), 1e-30)))
    return float(np.max(errors))  # np.max propagates NaN
