"""torch_rwkv6 as on a device that has no kernels: its PyTorch form, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.torch_job import torch_job
from benchmarks.work import Arrays, Job, Work
from torch_rwkv6 import chunked


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    return torch_job(work, inputs, threads, _Wkv.apply)


class _Wkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return chunked.wkv(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, ...]:
        return chunked.wkv_backward(*grads, *ctx.saved_tensors)
