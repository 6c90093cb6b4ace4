"""Time mixing of RWKV-6: the recurrent half of a block, around the WKV6 operator."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from torch_rwkv6.arguments import integer
from torch_rwkv6.nn.fast_path import linear, product
from torch_rwkv6.nn.initial_values import channels, fill, initialise, position
from torch_rwkv6.nn.multi_head import MultiHeadTimeMix
from torch_rwkv6.nn.sharded import entering, own

__all__ = ["TimeMix"]


class TimeMix(MultiHeadTimeMix):
    """RWKV-6 time mixing: data-dependent token shift and decay, then WKV6, GroupNorm and a gate.

    Peng et al., "Eagle and Finch", arXiv:2404.05892, section 4; names and initial values of
    ``RWKV_Tmix_x060`` in BlinkDL/RWKV-LM, RWKV-v5/src/model.py.

    Args:
        n_embd: width D = H * N.
        layer_id: index of the layer, 0 to n_layer - 1; the initial values depend on it.
        n_layer: number of layers of the model.
        head_size: N; must divide n_embd.
        lora_mix: rank of the data-dependent token shift; None is 32, or 64 from n_embd 4096.
        lora_decay: rank of the data-dependent decay; None is 64, or 128 from n_embd 4096.
        ln_x_eps: epsilon of the GroupNorm. Official checkpoints have 64e-5.
        train_state: adds ``time_state``, [H, N, N] as [value, key] (the official layout), the
            state that a sequence without a state starts from: see `RWKV6`.

    Raises:
        ValueError: a size below 1, head_size not dividing n_embd, or layer_id not below n_layer.
    """

    heads_along: ClassVar = {
        "time_decay": 2,
        "time_decay_w2": 1,
        **MultiHeadTimeMix.heads_along,
    }

    def __init__(
        self,
        n_embd: int,
        layer_id: int,
        n_layer: int,
        head_size: int = 64,
        *,
        lora_mix: int | None = None,
        lora_decay: int | None = None,
        ln_x_eps: float = 64e-5,
        train_state: bool = False,
    ) -> None:
        super().__init__(
            n_embd,
            layer_id,
            n_layer,
            head_size,
            ln_x_eps=ln_x_eps,
            gate=True,
            train_state=train_state,
        )
        lora_mix = (64 if n_embd >= 4096 else 32) if lora_mix is None else lora_mix
        lora_decay = (128 if n_embd >= 4096 else 64) if lora_decay is None else lora_decay
        lora_mix = integer("lora_mix", lora_mix, 1)
        lora_decay = integer("lora_decay", lora_decay, 1)
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_maa_w = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_maa_v = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_maa_g = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_maa_w1 = nn.Parameter(torch.empty(n_embd, 5 * lora_mix))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, lora_mix, n_embd))  # w, k, v, r, g
        self.time_decay = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_decay_w1 = nn.Parameter(torch.empty(n_embd, lora_decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(lora_decay, n_embd))
        self.time_faaaa = nn.Parameter(torch.empty(self.n_head, head_size))  # u
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the official initial values."""
        super().reset_parameters()
        depth, height = position(self.layer_id, self.n_layer)
        channel, _, _ = channels(self.n_head * self.head_size)
        decay, bonus = self._initial_decay_and_bonus()
        maa = 1 - channel**height
        for parameter, value in (
            (self.time_maa_x, maa),
            (self.time_maa_w, maa),
            (self.time_maa_k, maa),
            (self.time_maa_v, maa - 0.3 * depth),
            (self.time_maa_r, 1 - channel ** (0.5 * height)),
            (self.time_maa_g, 1 - channel ** (0.5 * height)),
            (self.time_decay, decay),
            (self.time_faaaa, bonus),
        ):
            fill(parameter, value)
        for w1, w2 in (
            (self.time_maa_w1, self.time_maa_w2),
            (self.time_decay_w1, self.time_decay_w2),
        ):
            nn.init.zeros_(w1)
            initialise(w2, nn.init.uniform_, a=-0.01, b=0.01)

    def _inputs(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None,  # [B, D]
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        batch, tokens, n_embd = x.shape
        xx, last = self.token_shift(x, shift, cu_seqlens)  # [B, T, D], [B, D]

        lora = torch.addcmul(x, xx, own(self.time_maa_x))  # [B, T, D]
        lora = torch.tanh(product(lora, own(self.time_maa_w1)))
        lora = lora.view(batch * tokens, 5, lora.shape[2] // 5).transpose(0, 1)  # [5, B * T, rank]
        lora = product(lora, own(self.time_maa_w2)).view(5, batch, tokens, n_embd)
        mixes = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r)
        maa = torch.stack([own(mix) for mix in (*mixes, self.time_maa_g)])  # [5, 1, 1, D]
        xw, xk, xv, xr, xg = torch.addcmul(x, xx, maa + lora).unbind()  # [B, T, D] each

        # w goes through two exponentials, so it is computed in at least float32, whatever x is.
        at_least_f32 = torch.promote_types(self.time_decay.dtype, torch.float32)
        w = torch.tanh(product(xw, own(self.time_decay_w1)))  # [B, T, rank]
        w = product(entering(w, self.time_decay_w2), own(self.time_decay_w2))
        w = own(self.time_decay).to(at_least_f32) + w  # [B, T, D]
        return (
            self._heads(linear(self.receptance, xr)),
            self._heads(linear(self.key, xk)),
            self._heads(linear(self.value, xv)),
            self._heads(w),
            own(self.time_faaaa),
            linear(self.gate, xg),
            last,
        )
