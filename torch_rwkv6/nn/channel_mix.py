"""Channel mixing: the feed-forward half of an RWKV-6 block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_rwkv6.nn.token_shift import token_shift

__all__ = ["ChannelMix"]


class ChannelMix(nn.Module):
    """RWKV-6 channel mixing: a squared-ReLU MLP with a sigmoid gate over shifted tokens.

    Peng et al., "Eagle and Finch", arXiv:2404.05892, section 3.2; names and initial values of
    ``RWKV_CMix_x060`` in BlinkDL/RWKV-LM, RWKV-v5/src/model.py.

    Args:
        n_embd: width D.
        layer_id: index of the layer, 0 to n_layer - 1; the initial values depend on it.
        n_layer: number of layers of the model.
        n_ffn: hidden width F; None is ``int(3.5 * n_embd) // 32 * 32``.

    Raises:
        ValueError: a size below 1, or layer_id not below n_layer.
    """

    def __init__(self, n_embd: int, layer_id: int, n_layer: int, n_ffn: int | None = None) -> None:
        super().__init__()
        n_ffn = int(3.5 * n_embd) // 32 * 32 if n_ffn is None else n_ffn
        if n_embd < 1 or n_ffn < 1:
            raise ValueError(f"n_embd, n_ffn: expected at least 1, got {n_embd} and {n_ffn}")
        if not 0 <= layer_id < n_layer:
            raise ValueError(f"layer_id: expected 0 to n_layer - 1 = {n_layer - 1}, got {layer_id}")
        self.layer_id, self.n_layer = layer_id, n_layer
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, n_embd))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, n_embd))
        self.key = nn.Linear(n_embd, n_ffn, bias=False)
        self.receptance = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_ffn, n_embd, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the official initial values."""
        n_embd = self.receptance.in_features
        channel = torch.arange(n_embd, device=self.time_maa_k.device) / n_embd  # [D], 0 to 1
        maa = 1 - channel ** ((1 - self.layer_id / self.n_layer) ** 3)
        self.time_maa_k.copy_(maa.expand_as(self.time_maa_k))
        self.time_maa_r.copy_(maa.expand_as(self.time_maa_r))
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None = None,  # [B, D]
    ) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, D]
        """Mixes the channels of every token.

        Args:
            x: input, [B, T, D], in the dtype of the parameters; T may be 0.
            shift: last token of the piece before, [B, D]; None is zeros.

        Returns:
            The output, [B, T, D], and the last token of x, [B, D], which is the ``shift`` of the
            next piece.
        """
        xx, shift = token_shift(x, shift)  # [B, T, D], [B, D]
        k = torch.relu(self.key(x + xx * self.time_maa_k)).square()  # [B, T, F]
        r = torch.sigmoid(self.receptance(x + xx * self.time_maa_r))  # [B, T, D]
        return r * self.value(k), shift
