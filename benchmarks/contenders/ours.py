"""torch_rwkv6 as a user calls it: `wkv`, its autograd, and `wkv_update` for decoding."""

from __future__ import annotations

import torch

import torch_rwkv6
from benchmarks.contenders.torch_job import to_arrays, torch_inputs, torch_job
from benchmarks.work import Arrays, Job, Work


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    job = _decode(work, inputs, threads) if work.kind == "decode" else None
    job = job or torch_job(work, inputs, threads, torch_rwkv6.wkv)
    job.version = f"torch_rwkv6 {torch_rwkv6.__version__}"
    return job


def _decode(work: Work, inputs: Arrays, threads: int) -> Job:
    torch.set_num_threads(threads)
    # As a server would, which creates all of its tensors in this mode. (The other PyTorch programs
    # have no_grad: what is compiled gets slower in this one.)
    with torch.inference_mode():
        x = torch_inputs(work, inputs)
    args, state = [x[name] for name in ("r", "k", "v", "w", "u")], x["state"]

    @torch.inference_mode()
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return torch_rwkv6.wkv_update(*args, state), state

    return Job(call, lambda results: to_arrays(work, results))
