"""Time mixing of RWKV-4: a softmax-like average over the past, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_rwkv6.arguments import integer
from torch_rwkv6.nn.carry import stateful, to_update
from torch_rwkv6.nn.fast_path import linear
from torch_rwkv6.nn.initial_values import channels, fill, position, with_initial_weight
from torch_rwkv6.nn.sharded import device_of
from torch_rwkv6.nn.token_shift import token_shift
from torch_rwkv6.ops import wkv4, wkv4_update

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
        n_embd = integer("n_embd", n_embd, 1)
        position(layer_id, n_layer)  # raises
        self.layer_id, self.n_layer = layer_id, n_layer
        self.state_shape = (3, n_embd)  # numerator, denominator, exponent
        self.time_decay = nn.Parameter(torch.empty(n_embd))
        self.time_first = nn.Parameter(torch.empty(n_embd))  # u
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, n_embd))

        def square(init: Callable[..., Any]) -> Any:
            return with_initial_weight(nn.Linear(n_embd, n_embd, bias=False), init)

        self.key = square(nn.init.zeros_)
        self.value = square(nn.init.orthogonal_)
        self.receptance = square(nn.init.zeros_)
        self.output = square(nn.init.zeros_)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the official initial values."""
        depth, height = position(self.layer_id, self.n_layer)
        channel, ramp, zigzag = channels(self.time_decay.numel())
        mix = channel**height
        for parameter, value in (
            (self.time_decay, -5 + 8 * ramp ** (0.7 + 1.3 * depth)),
            (self.time_first, math.log(0.3) + 0.5 * zigzag),
            (self.time_mix_k, mix),
            (self.time_mix_v, mix + 0.3 * depth),
            (self.time_mix_r, channel ** (0.5 * height)),
        ):
            fill(parameter, value)
        for module in (self.value, self.key, self.receptance, self.output):
            module.reset_parameters()

    def _inputs(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None,  # [B, D]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # r, k, v [B, T, D], last x [B, D]
        xx, last = token_shift(x, shift)
        before = x + xx
        r = torch.sigmoid(linear(self.receptance, torch.lerp(before, x, self.time_mix_r)))
        k = linear(self.key, torch.lerp(before, x, self.time_mix_k))
        return r, k, linear(self.value, torch.lerp(before, x, self.time_mix_v)), last

    @stateful
    def forward(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None = None,  # [B, D]
        state: Tensor | None = None,  # [B, 3, D]
        *,
        update: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, D], [B, D], [B, 3, D]
        """Mixes the tokens of every sequence, from the first to the last.

        Args:
            x: input, [B, T, D], in the dtype of the parameters; T may be 0.
            shift: last token of the piece before, [B, D]; None is zeros.
            state: of `torch_rwkv6.wkv4` after the piece before, [B, 3, D], float32 (float64 for
                float64 inputs); None is the start.
            update: writes the new shift and state to the memory of the old ones, and returns
                those, all of which must be given: for inference, without autograd.

        Returns:
            The output, [B, T, D]; the last token of x, [B, D]; the state after it, [B, 3, D].
        """
        r, k, v, last = self._inputs(x, shift)
        if update:
            shift, state = to_update(shift, state)
            y = wkv4_update(k, v, self.time_decay, self.time_first, state)
            return linear(self.output, r * y), shift.copy_(last), state
        y, state = wkv4(k, v, self.time_decay, self.time_first, state)
        return linear(self.output, r * y), last, state

    def initial_state(self) -> Tensor:
        """The state that a new sequence starts from: [1, 3, D], the sums are empty."""
        dtype = torch.promote_types(self.time_decay.dtype, torch.float32)
        state = torch.zeros((1, *self.state_shape), dtype=dtype, device=device_of(self.time_decay))
        state[:, 2] = -1e30
        return state
