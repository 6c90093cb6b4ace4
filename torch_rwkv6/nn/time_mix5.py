"""Time mixing of RWKV-5 ("Eagle"): WKV6 with a decay that does not depend on the token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torch_rwkv6.nn.fast_path import linear
from torch_rwkv6.nn.initial_values import channels, fill, position
from torch_rwkv6.nn.multi_head import MultiHeadTimeMix
from torch_rwkv6.nn.sharded import own

__all__ = ["TimeMix5"]


class TimeMix5(MultiHeadTimeMix):
    """RWKV-5 time mixing, of 5.2 (``RWKV_Tmix_x052``) and its forerunners 5.0 and 5.1.

    Peng et al., "Eagle and Finch", arXiv:2404.05892, section 3; names and initial values of
    BlinkDL/RWKV-LM, RWKV-v5/src/model.py.

    Args:
        n_embd, layer_id, n_layer, head_size, ln_x_eps, train_state: as for `TimeMix`.
        gate: whether the output is gated: not in 5.0.
        per_head: decay and bonus are one number a head, [H], as in 5.0 and 5.1, instead of one a
            channel, [H, N].
        log_bonus: the bonus is stored as its logarithm, ``time_first``, instead of as it is,
            ``time_faaaa``.

    Raises:
        ValueError: as for `TimeMix`.
    """

    heads_along: ClassVar = {
        "time_decay": 0,
        "time_first": 0,
        **MultiHeadTimeMix.heads_along,
    }

    def __init__(
        self,
        n_embd: int,
        layer_id: int,
        n_layer: int,
        head_size: int = 64,
        *,
        ln_x_eps: float = 64e-5,
        gate: bool = True,
        per_head: bool = False,
        log_bonus: bool = False,
        train_state: bool = False,
    ) -> None:
        super().__init__(
            n_embd,
            layer_id,
            n_layer,
            head_size,
            ln_x_eps=ln_x_eps,
            gate=gate,
            train_state=train_state,
        )
        self.per_head = per_head
        self.mixes: tuple[str, ...] = ("time_mix_k", "time_mix_v", "time_mix_r")
        self.mixes += ("time_mix_g",) if gate else ()
        for name in self.mixes:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, n_embd)))
        shape = (self.n_head,) if per_head else (self.n_head, head_size)
        self.time_decay = nn.Parameter(torch.empty(shape))
        self.time_first = nn.Parameter(torch.empty(shape)) if log_bonus else None
        self.time_faaaa = None if log_bonus else nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the official initial values: those of 5.2, averaged over a head where per head."""
        super().reset_parameters()
        depth, height = position(self.layer_id, self.n_layer)
        channel, _, _ = channels(self.n_head * self.head_size)
        mix = channel**height
        values = (mix, mix + 0.3 * depth, channel ** (0.5 * height), channel ** (0.5 * height))
        for name, value in zip(self.mixes, values):
            fill(self.get_parameter(name), value)
        decay, bonus = (
            x.view(self.n_head, self.head_size) for x in self._initial_decay_and_bonus()
        )
        if self.per_head:
            decay, bonus = decay.mean(1), bonus.mean(1)
        fill(self.time_decay, decay)
        if self.time_faaaa is not None:
            fill(self.time_faaaa, bonus)
        if self.time_first is not None:
            fill(self.time_first, bonus.clamp(min=1e-3).log())

    def _inputs(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None,  # [B, D]
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        xx, last = self.token_shift(x, shift, cu_seqlens)  # [B, T, D], [B, D]
        before = x + xx
        xk, xv, xr, *xg = (torch.lerp(before, x, own(getattr(self, n))) for n in self.mixes)

        r = self._heads(linear(self.receptance, xr))
        decay: Any = own(self.time_decay)  # [H, N] or [H], as the bonus
        bonus: Any
        if self.time_first is not None:
            at_least_f32 = torch.promote_types(decay.dtype, torch.float32)
            bonus = torch.exp(own(self.time_first).to(at_least_f32))
        else:
            assert self.time_faaaa is not None  # there is one of the two
            bonus = own(self.time_faaaa)
        if self.per_head:
            decay, bonus = (p.unsqueeze(1).expand(r.shape[2:]).contiguous() for p in (decay, bonus))
        return (
            r,
            self._heads(linear(self.key, xk)),
            self._heads(linear(self.value, xv)),
            decay.expand(r.shape),  # a view: one row of memory for all tokens
            bonus,
            None if self.gate is None else linear(self.gate, xg[0]),
            last,
        )
