"""The recurrence in plain PyTorch, token by token: the three lines that anyone would write."""

from __future__ import annotations

from torch import Tensor

from benchmarks.contenders.torch_job import torch_job
from benchmarks.work import Arrays, Job, Work
from torch_rwkv6.reference import recurrence


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    return torch_job(work, inputs, threads, wkv)


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final state [B, H, N, N]
    dtype = r.dtype
    r, k, v, w, u = (x.float() for x in (r, k, v, w, u))
    y, state = recurrence(r, k, v, w, u, state)
    return y.to(dtype), state
