"""RWKV-4's time mixing and channel mixing in PyTorch, under the official names.

Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048; initial values of
BlinkDL/RWKV-LM, RWKV-v4/src/model.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torch_rwkv6 import wkv


class RWKV4TimeMix(nn.Module):
    """RWKV-4's time mixing, on the operator of RWKV-6.

    Its numerator and denominator are two sums with one decay, that is WKV6 with the values (v, 1)
    and the key exp(k): heads of size 2, of which one key is used (see rwkv4_to_6.py).
    In float32 no key of a piece may be more than some 80 below a later one: exp(k) is 0 there.
    State: last token, numerator and denominator, and the m that k is taken relative to, [B, D].
    """

    def __init__(self, n_embd: int, layer: int, n_layer: int) -> None:
        super().__init__()
        depth, channel = layer / max(n_layer - 1, 1), torch.arange(n_embd)
        ramp = channel / max(n_embd - 1, 1)
        self.time_decay = nn.Parameter(-5 + 8 * ramp ** (0.7 + 1.3 * depth))
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        mix = (channel / n_embd) ** (1 - layer / n_layer)
        self.time_mix_k = nn.Parameter(mix.view(1, 1, -1))
        self.time_mix_v = nn.Parameter(mix.view(1, 1, -1) + 0.3 * depth)
        self.time_mix_r = nn.Parameter(mix.view(1, 1, -1).sqrt())
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)
        for matrix in (self.key, self.receptance, self.output):
            nn.init.zeros_(matrix.weight)
        nn.init.orthogonal_(self.value.weight)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        B, T, D = x.shape
        zero = x.new_zeros(B, D)
        last, num, den, old = state or (zero, zero, zero, zero - 1e30)
        before = torch.cat((last[:, None], x[:, :-1]), 1)  # [B, T, D]
        k = self.key(torch.lerp(before, x, self.time_mix_k))
        v = self.value(torch.lerp(before, x, self.time_mix_v))
        r = self.receptance(torch.lerp(before, x, self.time_mix_r))

        m = torch.maximum(k.detach().amax(1), old)  # [B, D]: cancels, but keeps exp(k) finite
        scale = (old - m).exp()
        k = (k - m[:, None]).exp()
        initial = torch.stack((num * scale, den * scale, zero, zero), -1).view(B, D, 2, 2)
        y, final = wkv(
            x.new_tensor([1.0, 0.0]).expand(B, T, D, 2),
            torch.stack((k, torch.zeros_like(k)), -1),
            torch.stack((v, torch.ones_like(v)), -1),
            self.time_decay[:, None].expand(B, T, D, 2),
            self.time_first.exp()[:, None].expand(D, 2),
            initial,
        )  # [B, T, D, 2], [B, D, 2, 2]
        y = torch.sigmoid(r) * y[..., 0] / y[..., 1]
        return self.output(y), (x[:, -1], final[:, :, 0, 0], final[:, :, 0, 1], m)


class RWKV4ChannelMix(nn.Module):
    """RWKV-4's channel mixing. State: the last token, [B, D]."""

    def __init__(self, n_embd: int, n_ffn: int, layer: int, n_layer: int) -> None:
        super().__init__()
        mix = (torch.arange(n_embd) / n_embd) ** (1 - layer / n_layer)
        self.time_mix_k = nn.Parameter(mix.view(1, 1, -1))
        self.time_mix_r = nn.Parameter(mix.view(1, 1, -1).clone())
        self.key = nn.Linear(n_embd, n_ffn, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_ffn, n_embd, bias=False)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        last = torch.zeros_like(x[:, 0]) if state is None else state  # [B, D]
        before = torch.cat((last[:, None], x[:, :-1]), 1)  # [B, T, D]
        k = torch.relu(self.key(torch.lerp(before, x, self.time_mix_k))).square()
        r = torch.sigmoid(self.receptance(torch.lerp(before, x, self.time_mix_r)))
        return r * self.value(k), x[:, -1]
