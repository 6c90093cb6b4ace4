"""The two PyTorch programs under torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders import chunked
from benchmarks.contenders.torch_job import Function, torch_job
from benchmarks.work import Arrays, Job, UnsupportedError, Work

COMPILED_SEGMENT = 64  # of the chunked form; compiling time grows with it


def prepare_loop(work: Work, inputs: Arrays, threads: int) -> Job:
    return torch_job(work, inputs, threads, loop())


def loop() -> Function:
    """One token is compiled: a compiled loop would be unrolled, which takes minutes to compile."""
    step = torch.compile(_step, dynamic=False)

    def wkv(r, k, v, w, u, state):
        y = []
        tokens = zip(*(x.unbind(1) for x in (r, k, v, w)), strict=True)
        for r_t, k_t, v_t, w_t in tokens:
            y_t, state = step(r_t, k_t, v_t, w_t, u, state)
            y.append(y_t)
        return torch.stack(y, 1).to(r.dtype), state

    return wkv


def _step(
    r: Tensor,  # [B, H, N]
    k: Tensor,  # [B, H, N]
    v: Tensor,  # [B, H, N]
    w: Tensor,  # [B, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N]
) -> tuple[Tensor, Tensor]:  # y [B, H, N], state [B, H, N, N]
    r, k, v, w, u = (x.float() for x in (r, k, v, w, u))
    kv = k[..., None] * v[..., None, :]
    y = (r[..., None] * (state + u[..., None] * kv)).sum(-2)
    return y, torch.exp(-torch.exp(w.clamp(max=7.0)))[..., None] * state + kv


def prepare_chunked(work: Work, inputs: Arrays, threads: int) -> Job:
    if work.kind == "decode":
        raise UnsupportedError("one token is no chunk: see the loop")
    return torch_job(work, inputs, threads, chunks())


def chunks() -> Function:
    segment = torch.compile(chunked.segment, dynamic=False)

    def wkv(*args: Tensor) -> tuple[Tensor, Tensor]:
        return chunked.wkv(*args, length=COMPILED_SEGMENT, run=segment)

    return wkv
