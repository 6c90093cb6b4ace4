"""Time mixing: the recurrent half of an RWKV-6 block, around the WKV6 operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_rwkv6.nn.token_shift import token_shift
from torch_rwkv6.ops import wkv

__all__ = ["TimeMix"]


class TimeMix(nn.Module):
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
        super().__init__()
        if n_embd < 1 or head_size < 1 or n_embd % head_size:
            raise ValueError(f"head_size: expected a divisor of n_embd = {n_embd}, got {head_size}")
        if not 0 <= layer_id < n_layer:
            raise ValueError(f"layer_id: expected 0 to n_layer - 1 = {n_layer - 1}, got {layer_id}")
        lora_mix = (64 if n_embd >= 4096 else 32) if lora_mix is None else lora_mix
        lora_decay = (128 if n_embd >= 4096 else 64) if lora_decay is None else lora_decay
        if lora_mix < 1 or lora_decay < 1:
            raise ValueError(
                f"lora_mix, lora_decay: expected at least 1, got {lora_mix} and {lora_decay}"
            )
        n_head = n_embd // head_size
        self.layer_id, self.n_layer = layer_id, n_layer
        self.n_head, self.head_size = n_head, head_size

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
        self.time_faaaa = nn.Parameter(torch.empty(n_head, head_size))  # u
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)
        self.gate = nn.Linear(n_embd, n_embd, bias=False)
        self.ln_x = nn.GroupNorm(n_head, n_embd, eps=ln_x_eps)
        self.time_state: nn.Parameter | None
        if train_state:
            self.time_state = nn.Parameter(torch.empty(n_head, head_size, head_size))
        else:
            self.register_parameter("time_state", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the official initial values."""
        n_embd = self.n_head * self.head_size
        depth = self.layer_id / max(self.n_layer - 1, 1)  # 0 to 1; 0 for a model of one layer
        height = 1 - self.layer_id / self.n_layer  # 1 to almost 0
        n = torch.arange(n_embd, device=self.time_decay.device)  # [D]
        channel, ramp = n / n_embd, n / max(n_embd - 1, 1)  # [D], 0 to almost 1 and 0 to 1

        maa = 1 - channel**height
        for parameter, value in (
            (self.time_maa_x, maa),
            (self.time_maa_w, maa),
            (self.time_maa_k, maa),
            (self.time_maa_v, maa - 0.3 * depth),
            (self.time_maa_r, 1 - channel ** (0.5 * height)),
            (self.time_maa_g, 1 - channel ** (0.5 * height)),
            (self.time_decay, -6 + 5 * ramp ** (0.7 + 1.3 * depth)),
            (self.time_faaaa, depth * (1 - ramp) + ((n + 1) % 3 - 1) * 0.1),
        ):
            parameter.copy_(value.view(parameter.shape))
        for w1, w2 in (
            (self.time_maa_w1, self.time_maa_w2),
            (self.time_decay_w1, self.time_decay_w2),
        ):
            nn.init.zeros_(w1)
            nn.init.uniform_(w2, -0.01, 0.01)

        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.value.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.gate.weight, gain=0.1)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.ln_x.weight, ((1 + self.layer_id) / self.n_layer) ** 0.7)
        nn.init.zeros_(self.ln_x.bias)
        if self.time_state is not None:
            nn.init.zeros_(self.time_state)

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
        batch, tokens, n_embd = x.shape
        heads = (batch, tokens, self.n_head, self.head_size)
        xx, shift = token_shift(x, shift)  # [B, T, D], [B, D]

        lora = torch.tanh((x + xx * self.time_maa_x) @ self.time_maa_w1)  # [B, T, 5 * lora_mix]
        lora = lora.view(batch * tokens, 5, lora.shape[2] // 5).transpose(0, 1)
        lora = torch.bmm(lora, self.time_maa_w2).view(5, batch, tokens, n_embd)
        maa = torch.stack(
            (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        )  # [5, 1, 1, D]
        xw, xk, xv, xr, xg = (x + xx * (maa + lora)).unbind()  # [B, T, D] each

        # w goes through two exponentials: it is summed in at least float32, whatever x is
        at_least_f32 = torch.promote_types(self.time_decay.dtype, torch.float32)
        w = torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        w = self.time_decay.to(at_least_f32) + w  # [B, T, D]

        if state is None and self.time_state is not None:
            state = self.initial_state()
        y, state = wkv(
            self.receptance(xr).view(heads),
            self.key(xk).view(heads),
            self.value(xv).view(heads),
            w.view(heads),
            self.time_faaaa,
            state,
        )  # [B, T, H, N], [B, H, N, N]
        y = self.ln_x(y.reshape(batch * tokens, n_embd)).view(batch, tokens, n_embd)
        return self.output(y * nn.functional.silu(self.gate(xg))), shift, state

    def initial_state(self) -> Tensor:
        """The WKV state that a new sequence starts from: [1, H, N, N] as [key, value].

        float32 (float64 in a float64 model); zeros, or ``time_state`` with its gradient.
        """
        dtype = torch.promote_types(self.time_decay.dtype, torch.float32)
        if self.time_state is not None:
            return self.time_state.to(dtype).transpose(1, 2).unsqueeze(0)
        shape = (1, self.n_head, self.head_size, self.head_size)
        return torch.zeros(shape, dtype=dtype, device=self.time_decay.device)
