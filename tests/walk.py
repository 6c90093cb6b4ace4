"""WKV6 over the decays themselves, in either direction: the oracle of torch_rwkv6.compat."""

from __future__ import annotations

import torch
from torch import Tensor


def walk(
    r: Tensor,  # [B, T, H, N], float64, as all
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    decay: Tensor,  # [B, T, H, N], in [0, 1]
    u: Tensor,  # [H, N]
    state: Tensor,  # [B, H, N, N], [key, value]
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final state [B, H, N, N]
    """From the first token to the last, or from the last to the first. Differentiable."""
    assert {x.dtype for x in (r, k, v, decay, u, state)} == {torch.float64}
    order = range(r.shape[1])
    y = {}
    for t in reversed(order) if reverse else order:
        kv = torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        y[t] = torch.einsum("bhi,bhij->bhj", r[:, t], state + u[:, :, None] * kv)
        state = decay[:, t, :, :, None] * state + kv
    return torch.stack([y[t] for t in order], 1), state
