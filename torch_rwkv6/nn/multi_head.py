"""What the time mixing of RWKV-5 and RWKV-6 share: everything after r, k, v, w and the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torch_rwkv6.arguments import integer, number
from torch_rwkv6.contract import MAX_HEAD_SIZE
from torch_rwkv6.nn.carry import packed, stateful, to_update
from torch_rwkv6.nn.fast_path import linear
from torch_rwkv6.nn.initial_values import channels, position, with_initial_weight
from torch_rwkv6.nn.sharded import device_of, own
from torch_rwkv6.nn.token_shift import token_shift
from torch_rwkv6.ops import wkv, wkv_update

__all__ = ["MultiHeadTimeMix"]


class MultiHeadTimeMix(nn.Module):
    """Time mixing over H matrix states: projections, WKV6, GroupNorm over heads, gate, output.

    A subclass adds its mixes, decay and bonus, and computes the inputs of WKV6 in `_inputs`.

    Attributes:
        n_head, head_size: H and N, of the whole layer. Where several processes share its heads
            (`torch_rwkv6.parallel.parallelize`), a process has some of H.
        state_shape: of one sequence, on this process: (H, N, N) as [key, value].
        heads_along: the dimension that goes over heads, or over the channels of all heads, of each
            parameter that has one.
    """

    time_decay: Tensor  # of the subclass
    heads_along: ClassVar[dict[str, int]] = {"time_faaaa": 0, "time_state": 0}

    # Another pair takes their place where a sequence is cut over processes.
    token_shift = staticmethod(token_shift)
    wkv = staticmethod(wkv)

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
        n_embd = integer("n_embd", n_embd, 1)
        head_size = integer("head_size", head_size, 1, MAX_HEAD_SIZE)
        if n_embd % head_size:
            raise ValueError(f"head_size: expected a divisor of n_embd = {n_embd}, got {head_size}")
        if number("ln_x_eps", ln_x_eps) < 0:
            raise ValueError(f"ln_x_eps: expected at least 0, got {ln_x_eps}")
        position(layer_id, n_layer)  # raises
        n_head = n_embd // head_size
        self.layer_id, self.n_layer = layer_id, n_layer
        self.n_head, self.head_size = n_head, head_size
        self.state_shape = (n_head, head_size, head_size)  # [key, value]

        def square(init: Callable[..., Any], **options: float) -> Any:
            return with_initial_weight(nn.Linear(n_embd, n_embd, bias=False), init, **options)

        self.receptance = square(nn.init.orthogonal_)
        self.key = square(nn.init.orthogonal_, gain=0.1)
        self.value = square(nn.init.orthogonal_)
        self.output = square(nn.init.zeros_)
        self.gate: Any = square(nn.init.orthogonal_, gain=0.1) if gate else None
        self.ln_x = with_initial_weight(
            nn.GroupNorm(n_head, n_embd, eps=ln_x_eps),
            nn.init.constant_,
            val=((1 + layer_id) / n_layer) ** 0.7,
        )
        self.time_state: nn.Parameter | None
        if train_state:
            self.time_state = nn.Parameter(torch.empty(self.state_shape))  # [value, key]
        else:
            self.register_parameter("time_state", None)

    def reset_parameters(self) -> None:
        """Sets the official initial values of what is defined here."""
        for module in (self.receptance, self.value, self.key, self.gate, self.output, self.ln_x):
            if module is not None:
                module.reset_parameters()
        if self.time_state is not None:
            nn.init.zeros_(self.time_state)

    def _initial_decay_and_bonus(self) -> tuple[Tensor, Tensor]:  # [D], [D]
        depth, _ = position(self.layer_id, self.n_layer)
        _, ramp, zigzag = channels(self.n_head * self.head_size)
        return -6 + 5 * ramp ** (0.7 + 1.3 * depth), depth * (1 - ramp) + zigzag * 0.1

    def _inputs(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None,  # [B, D]
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """r, k, v, w [B, T, H, N] and u [H, N] of WKV6; the gate [B, T, D] or None; the last x."""
        raise NotImplementedError

    def _heads(self, x: Tensor) -> Tensor:  # [B, T, H, N]
        """[B, T, D] by heads: those of this process."""
        return x.unflatten(2, (-1, self.head_size))

    def _output(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """y [B, T, H, N] normed, gated and projected: [B, T, D]."""
        batch, tokens, n_head, head_size = y.shape
        n_embd = n_head * head_size
        y = self.ln_x(y.reshape(batch * tokens, n_embd)).view(batch, tokens, n_embd)
        return linear(self.output, y if gate is None else y * nn.functional.silu(gate))

    @stateful
    @packed
    def forward(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None = None,  # [B, D]
        state: Tensor | None = None,  # [B, H, N, N], [key, value]
        *,
        update: bool = False,
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, D], [B, D], [B, H, N, N]
        """Mixes the tokens of every sequence, from the first to the last.

        Args:
            x: input, [B, T, D], in the dtype of the parameters; T may be 0.
            shift: last token of the piece before, [B, D]; None is zeros.
            state: WKV state after the piece before, [B, H, N, N] as [key, value], float32 (float64
                for float64 inputs); None is zeros, or ``time_state`` where there is one.
            update: writes the new shift and state to the memory of the old ones, and returns
                those, all of which must be given: for inference, without autograd.
            cu_seqlens: B is 1, and x is M sequences packed one after the other, as in
                `torch_rwkv6.wkv`; shift and state have M rows then.

        Returns:
            The output, [B, T, D]; the last token of x, [B, D]; the WKV state after it,
            [B, H, N, N]. The last two are the ``shift`` and ``state`` of the next piece.
        """
        r, k, v, w, u, gate, last = self._inputs(x, shift, cu_seqlens)
        if update:
            shift, state = to_update(shift, state)
            y = wkv_update(r, k, v, w, u, state, cu_seqlens=cu_seqlens)  # [B, T, H, N]
            return self._output(y, gate), shift.copy_(last), state
        if state is None and self.time_state is not None:
            state = self.initial_state()
        # [B, T, H, N] and [B, H, N, N]
        y, state = self.wkv(r, k, v, w, u, state, cu_seqlens=cu_seqlens)
        return self._output(y, gate), last, state

    def initial_state(self) -> Tensor:
        """The WKV state that a new sequence starts from: [1, H, N, N] as [key, value].

        float32 (float64 in a float64 model); zeros, or ``time_state`` with its gradient.
        """
        dtype = torch.promote_types(self.time_decay.dtype, torch.float32)
        if self.time_state is not None:
            return own(self.time_state).to(dtype).transpose(1, 2).unsqueeze(0)
        device = device_of(self.time_decay)
        return torch.zeros((1, *self.state_shape), dtype=dtype, device=device)
