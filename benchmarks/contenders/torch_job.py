"""The work as a PyTorch program does it, for any `wkv(r, k, v, w, u, state) -> (y, state)`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.work import OUTPUTS, Arrays, Job, Work

Function = Callable[..., tuple[Tensor, Tensor]]


def torch_inputs(work: Work, inputs: Arrays) -> dict[str, Tensor]:
    """The inputs as tensors of the work's dtype; the state stays float32."""
    dtype = getattr(torch, work.dtype)
    x = {name: torch.from_numpy(a).to(dtype) for name, a in inputs.items() if name != "state"}
    return x | {"state": torch.from_numpy(inputs["state"])}


def to_arrays(work: Work, results: tuple[Tensor, ...]) -> Arrays:
    return {
        name: x.detach().float().numpy()
        for name, x in zip(OUTPUTS[work.kind], results, strict=True)
    }


def torch_job(work: Work, inputs: Arrays, threads: int, wkv: Function) -> Job:
    """`wkv` forward, backward through autograd, or token by token."""
    torch.set_num_threads(threads)
    x = torch_inputs(work, inputs)
    args = [x[name] for name in ("r", "k", "v", "w", "u", "state")]
    if work.kind in ("forward", "decode"):
        call = _forward(work, args, wkv)
    else:
        call = _backward(work, args, x["grad_y"], wkv)
    return Job(call, lambda results: to_arrays(work, results), f"torch {torch.__version__}")


def _forward(work: Work, args: list[Tensor], wkv: Function) -> Callable[[], tuple[Tensor, ...]]:
    carry = work.kind == "decode"
    state = args.pop()

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        nonlocal state
        y, new = wkv(*args, state)
        if carry:
            state = new
        return y, new

    return call


def _backward(
    work: Work, args: list[Tensor], grad_y: Tensor, wkv: Function
) -> Callable[[], tuple[Tensor, ...]]:
    leaves = [x.requires_grad_() for x in args]
    if work.kind == "forward + backward":
        return lambda: torch.autograd.grad(wkv(*leaves)[0], leaves, grad_y)
    y = wkv(*leaves)[0]
    return lambda: torch.autograd.grad(y, leaves, grad_y, retain_graph=True)
