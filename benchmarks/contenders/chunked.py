"""WKV6 over chunks of tokens in plain PyTorch: matrix products instead of a loop over tokens.

Safe for every w: decays are only multiplied, so no exponent is positive, and there is no division
and no difference of sums. Within a chunk, neighbouring blocks are joined two by
two, as in a merge sort, until one block is the chunk. What crosses from the left block into the
right one is `(r * decays before it in its block) @ (k * decays after it in its block)^T`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.contenders.torch_job import torch_job
from benchmarks.work import Arrays, Job, UnsupportedError, Work

SEGMENT = 128  # tokens at a time: the intermediate results stay in cache
CHUNK = 32


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    if work.kind == "decode":
        raise UnsupportedError("one token is no chunk: see the loop")
    return torch_job(work, inputs, threads, wkv)


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N]
    *,
    length: int = SEGMENT,
    run: Callable[..., tuple[Tensor, Tensor]] | None = None,  # in place of `segment`
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final state [B, H, N, N]
    T, dtype = r.shape[1], r.dtype
    wide = torch.promote_types(dtype, torch.float32)
    r, k, v, w, u = (x.to(wide) for x in (r, k, v, w, u))
    decay = torch.exp(-torch.exp(w.clamp(max=7.0)))  # exp(-exp(7)) is 0: no inf in the gradient
    missing = -T % CHUNK
    if missing:  # tokens that leave the state as it is
        r, k, v = (pad(x, (0, 0, 0, 0, 0, missing)) for x in (r, k, v))
        decay = pad(decay, (0, 0, 0, 0, 0, missing), value=1.0)
    outputs = []
    for tokens in zip(*(x.split(length, 1) for x in (r, k, v, decay)), strict=True):
        y, state = (run or segment)(*tokens, u, state)
        outputs.append(y)
    return torch.cat(outputs, 1)[:, :T].to(dtype), state


def segment(
    r: Tensor,  # [B, T, H, N], T a multiple of CHUNK
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    decay: Tensor,  # [B, T, H, N], exp(-exp(w))
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], state after the segment [B, H, N, N]
    B, T, H, N = r.shape
    r, k, v, decay = (  # [B, H, chunks, blocks, tokens of a block, N], first with blocks of one
        x.reshape(B, T // CHUNK, CHUNK, H, 1, N).permute(0, 3, 1, 2, 4, 5) for x in (r, k, v, decay)
    )
    v = v.squeeze(-2)  # [B, H, chunks, CHUNK, N]
    scores = (r * u[:, None, None, None] * k).sum(-1, keepdim=True)  # of a token with itself
    while (m := scores.shape[-1]) < CHUNK:
        # each is [B, H, chunks, blocks / 2, ...]: the left blocks and the right blocks
        (s0, s1), (r0, r1), (k0, k1), (d0, d1) = (
            (x[:, :, :, 0::2], x[:, :, :, 1::2]) for x in (scores, r, k, decay)
        )
        across = torch.cat((r1 @ k0.transpose(-1, -2), s1), -1)
        scores = torch.cat((pad(s0, (0, m)), across), -2)
        r, k, decay = torch.cat((r0, r1 * d0), -2), torch.cat((k0 * d1, k1), -2), d0 * d1
    scores, r, k, decay = (x.squeeze(3) for x in (scores, r, k, decay))
    added = k.transpose(-1, -2) @ v  # [B, H, chunks, N, N]
    decay = decay.transpose(-1, -2)  # [B, H, chunks, N, 1]
    starts = []
    for chunk in range(T // CHUNK):
        starts.append(state)
        state = decay[:, :, chunk] * state + added[:, :, chunk]
    y = scores @ v + r @ torch.stack(starts, 2)  # [B, H, chunks, CHUNK, N]
    return y.permute(0, 2, 3, 1, 4).reshape(B, T, H, N), state
