"""The recurrence in plain PyTorch, token by token: the three lines that anyone would write."""

from __future__ import annotations

from benchmarks.contenders.torch_job import torch_job
from benchmarks.work import Arrays, Job, Work
from torch_rwkv6.reference import recurrence


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    def wkv(r, k, v, w, u, state):
        dtype = r.dtype
        r, k, v, w, u = (x.float() for x in (r, k, v, w, u))
        y, state = recurrence(r, k, v, w, u, state)
        return y.to(dtype), state

    return torch_job(work, inputs, threads, wkv)
