"""Time mixing of RWKV-4: a softmax-like average over the past, channel by channel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torch_rwkv6.nn.initial_values import channels, position
from torch_rwkv6.nn.linear import Linear
from torch_rwkv6.nn.token_shift import token_shift
from torch_rwkv6.ops import wkv4, wkv4_

__all__ = ["TimeMix4"]


class TimeMix4(nn.Module):
    """RWKV-4 time mixing: token shift, the operator `torch_rwkv6.wkv4` and a receptance gate.

    Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, section 3;
    names and initial values of ``RWKV_TimeMix`` in BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py.

    Args:
        n_embd: width D.
        layer_id: index of the layer, 0 to n_layer - 1; the initial values depend on it.
        n_layer: number of layers of the model.

    Raises:
        ValueError: n_embd below 1, or layer_id not below n_layer.
    """

    def __init__(self, n_embd: int, layer_id: int, n_layer: int) -> None:
        super().__init__()
        if n_embd < 1:
            raise ValueError(f"n_embd: expected at least 1, got {n_embd}")
        position(layer_id, n_layer)  # raises
        self.layer_id, self.n_layer = layer_id, n_layer
        self.state_shape = (3, n_embd)  # numerator, denominator, exponent
        self.time_decay = nn.Parameter(torch.empty(n_embd))
        self.time_first = nn.Parameter(torch.empty(n_embd))  # u
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, n_embd))
        self.key = Linear(n_embd, n_embd)
        self.value = Linear(n_embd, n_embd)
        self.receptance = Linear(n_embd, n_embd)
        self.output = Linear(n_embd, n_embd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the official initial values."""
        depth, height = position(self.layer_id, self.n_layer)
        channel, ramp, zigzag = channels(self.time_decay.numel(), self.time_decay.device)
        mix = channel**height
        for parameter, value in (
            (self.time_decay, -5 + 8 * ramp ** (0.7 + 1.3 * depth)),
            (self.time_first, math.log(0.3) + 0.5 * zigzag),
            (self.time_mix_k, mix),
            (self.time_mix_v, mix + 0.3 * depth),
            (self.time_mix_r, channel ** (0.5 * height)),
        ):
            parameter.copy_(value.view(parameter.shape))
        nn.init.orthogonal_(self.value.weight)
        for linear in (self.key, self.receptance, self.output):
            nn.init.zeros_(linear.weight)

    def _inputs(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None,  # [B, D]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # r, k, v [B, T, D], last x [B, D]
        xx, last = token_shift(x, shift)
        before = x + xx
        r = torch.sigmoid(self.receptance(torch.lerp(before, x, self.time_mix_r)))
        k = self.key(torch.lerp(before, x, self.time_mix_k))
        return r, k, self.value(torch.lerp(before, x, self.time_mix_v)), last

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None = None,  # [B, D]
        state: Tensor | None = None,  # [B, 3, D]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, D], [B, D], [B, 3, D]
        """Mixes the tokens of every sequence, from the first to the last.

        Args:
            x: input, [B, T, D], in the dtype of the parameters; T may be 0.
            shift: last token of the piece before, [B, D]; None is zeros.
            state: of `torch_rwkv6.wkv4` after the piece before, [B, 3, D], float32 (float64 for
                float64 inputs); None is the start.

        Returns:
            The output, [B, T, D]; the last token of x, [B, D]; the state after it, [B, 3, D].
        """
        r, k, v, shift = self._inputs(x, shift)
        y, state = wkv4(k, v, self.time_decay, self.time_first, state)
        return self.output(r * y), shift, state

    def forward_(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor,  # [B, D], updated in place
        state: Tensor,  # [B, 3, D], updated in place
    ) -> Tensor:  # [B, T, D]
        """As `forward`, but updates shift and state in place: for inference, without autograd."""
        r, k, v, last = self._inputs(x, shift)
        y = wkv4_(k, v, self.time_decay, self.time_first, state)
        shift.copy_(last)
        return self.output(r * y)

    def initial_state(self) -> Tensor:
        """The state that a new sequence starts from: [1, 3, D], nothing summed up yet."""
        dtype = torch.promote_types(self.time_decay.dtype, torch.float32)
        state = torch.zeros((1, *self.state_shape), dtype=dtype, device=self.time_decay.device)
        state[:, 2] = -1e30
        return state
