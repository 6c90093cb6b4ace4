"""What the time mixing of RWKV-5 and RWKV-6 have in common: all behind r, k, v, w and the gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_rwkv6.nn.initial_values import channels, position
from torch_rwkv6.nn.linear import Linear
from torch_rwkv6.ops import wkv, wkv_

__all__ = ["MultiHeadTimeMix"]


class MultiHeadTimeMix(nn.Module):
    """Time mixing over H matrix states: projections, WKV6, GroupNorm over heads, gate, output.

    A subclass adds its token shift, decay and bonus, and says in `_inputs` what goes into WKV6.
    """

    def __init__(
        self,
        n_embd: int,
        layer_id: int,
        n_layer: int,
        head_size: int,
        *,
        ln_x_eps: float,
        gate: bool,
        train_state: bool,
    ) -> None:
        super().__init__()
        if n_embd < 1 or head_size < 1 or n_embd % head_size:
            raise ValueError(f"head_size: expected a divisor of n_embd = {n_embd}, got {head_size}")
        position(layer_id, n_layer)  # raises
        n_head = n_embd // head_size
        self.layer_id, self.n_layer = layer_id, n_layer
        self.n_head, self.head_size = n_head, head_size
        self.state_shape = (n_head, head_size, head_size)  # [key, value]
        self.receptance = Linear(n_embd, n_embd)
        self.key = Linear(n_embd, n_embd)
        self.value = Linear(n_embd, n_embd)
        self.output = Linear(n_embd, n_embd)
        self.gate = Linear(n_embd, n_embd) if gate else None
        self.ln_x = nn.GroupNorm(n_head, n_embd, eps=ln_x_eps)
        self.time_state: nn.Parameter | None
        if train_state:
            self.time_state = nn.Parameter(torch.empty(self.state_shape))  # [value, key]
        else:
            self.register_parameter("time_state", None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the official initial values of what is defined here."""
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.value.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        if self.gate is not None:
            nn.init.orthogonal_(self.gate.weight, gain=0.1)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer_id) / self.n_layer) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)
        if self.time_state is not None:
            nn.init.zeros_(self.time_state)

    def _initial_decay_and_bonus(self) -> tuple[Tensor, Tensor]:  # [D], [D]
        depth, _ = position(self.layer_id, self.n_layer)
        n_embd = self.n_head * self.head_size
        _, ramp, zigzag = channels(n_embd, self.output.weight.device)
        return -6 + 5 * ramp ** (0.7 + 1.3 * depth), depth * (1 - ramp) + zigzag * 0.1

    def _inputs(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None,  # [B, D]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """r, k, v, w [B, T, H, N] and u [H, N] of WKV6; the gate [B, T, D] or None; the last x."""
        raise NotImplementedError

    def _output(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """y [B, T, H, N] normed, gated and projected: [B, T, D]."""
        batch, tokens, n_head, head_size = y.shape
        n_embd = n_head * head_size
        y = self.ln_x(y.reshape(batch * tokens, n_embd)).view(batch, tokens, n_embd)
        return self.output(y if gate is None else y * nn.functional.silu(gate))

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None = None,  # [B, D]
        state: Tensor | None = None,  # [B, H, N, N], [key, value]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, D], [B, D], [B, H, N, N]
        """Mixes the tokens of every sequence, from the first to the last.

        Args:
            x: input, [B, T, D], in the dtype of the parameters; T may be 0.
            shift: last token of the piece before, [B, D]; None is zeros.
            state: WKV state after the piece before, [B, H, N, N] as [key, value], float32 (float64
                for float64 inputs); None is zeros, or ``time_state`` where there is one.

        Returns:
            The output, [B, T, D]; the last token of x, [B, D]; the WKV state after it,
            [B, H, N, N]. The last two are the ``shift`` and ``state`` of the next piece.
        """
        r, k, v, w, u, gate, shift = self._inputs(x, shift)
        if state is None and self.time_state is not None:
            state = self.initial_state()
        y, state = wkv(r, k, v, w, u, state)  # [B, T, H, N], [B, H, N, N]
        return self._output(y, gate), shift, state

    def forward_(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor,  # [B, D], updated in place
        state: Tensor,  # [B, H, N, N], updated in place
    ) -> Tensor:  # [B, T, D]
        """As `forward`, but updates shift and state in place: for inference, without autograd."""
        r, k, v, w, u, gate, last = self._inputs(x, shift)
        y = wkv_(r, k, v, w, u, state)
        shift.copy_(last)
        return self._output(y, gate)

    def initial_state(self) -> Tensor:
        """The WKV state that a new sequence starts from: [1, H, N, N] as [key, value].

        float32 (float64 in a float64 model); zeros, or ``time_state`` with its gradient.
        """
        dtype = torch.promote_types(self.output.weight.dtype, torch.float32)
        if self.time_state is not None:
            return self.time_state.to(dtype).transpose(1, 2).unsqueeze(0)
        return torch.zeros((1, *self.state_shape), dtype=dtype, device=self.output.weight.device)
