"""Channel mixing: the feed-forward half of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_rwkv6.arguments import integer
from torch_rwkv6.nn.carry import packed
from torch_rwkv6.nn.fast_path import linear
from torch_rwkv6.nn.initial_values import channels, fill, position, with_initial_weight
from torch_rwkv6.nn.sharded import own
from torch_rwkv6.nn.token_shift import token_shift

__all__ = ["ChannelMix", "ChannelMix4", "ChannelMix5"]


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

    time_maa_k: Tensor  # [1, 1, D]
    time_maa_r: Tensor  # [1, 1, D]
    mixes = ("time_maa_k", "time_maa_r")  # how much of the previous token k and r see

    # Another one takes its place where a sequence is cut over processes.
    token_shift = staticmethod(token_shift)

    def __init__(self, n_embd: int, layer_id: int, n_layer: int, n_ffn: int | None = None) -> None:
        super().__init__()
        n_embd = integer("n_embd", n_embd, 1)
        n_ffn = integer("n_ffn", int(3.5 * n_embd) // 32 * 32 if n_ffn is None else n_ffn, 1)
        position(layer_id, n_layer)  # raises
        self.n_embd, self.layer_id, self.n_layer = n_embd, layer_id, n_layer
        for name in self.mixes:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, n_embd)))
        self.key = with_initial_weight(
            nn.Linear(n_embd, n_ffn, bias=False),
            nn.init.orthogonal_,
            gain=self._key_gain(n_embd, n_ffn),
        )
        self.receptance = with_initial_weight(nn.Linear(n_embd, n_embd, bias=False), nn.init.zeros_)
        self.value = with_initial_weight(nn.Linear(n_ffn, n_embd, bias=False), nn.init.zeros_)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the official initial values."""
        for name, value in zip(self.mixes, self._initial_mixes(), strict=True):
            fill(self.get_parameter(name), value)
        for layer in (self.key, self.receptance, self.value):
            layer.reset_parameters()

    def _initial_mixes(self) -> tuple[Tensor, Tensor]:  # [D], [D]
        _, height = position(self.layer_id, self.n_layer)
        channel, _, _ = channels(self.n_embd)
        maa = 1 - channel ** (height**3)
        return maa, maa

    def _key_gain(self, n_embd: int, n_ffn: int) -> float:
        return 1.0

    def _mixed(self, x: Tensor, xx: Tensor) -> tuple[Tensor, Tensor]:  # [B, T, D] each
        """The inputs of k and r, from a token and the previous one minus it."""
        maa_k, maa_r = own(self.time_maa_k), own(self.time_maa_r)
        return torch.addcmul(x, xx, maa_k), torch.addcmul(x, xx, maa_r)

    @packed
    def forward(
        self,
        x: Tensor,  # [B, T, D]
        shift: Tensor | None = None,  # [B, D]
        *,
        cu_seqlens: Tensor | None = None,  # [M + 1]
    ) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, D]
        """Mixes the channels of every token.

        Args:
            x: input, [B, T, D], in the dtype of the parameters; T may be 0.
            shift: last token of the piece before, [B, D]; None is zeros.
            cu_seqlens: B is 1, and x is M sequences packed one after the other; shift has M rows
                then.

        Returns:
            The output, [B, T, D], and the last token of x, [B, D], which is the ``shift`` of the
            next piece.
        """
        xx, shift = self.token_shift(x, shift, cu_seqlens)  # [B, T, D], [B, D]
        xk, xr = self._mixed(x, xx)
        k = torch.relu(linear(self.key, xk)).square()  # [B, T, F]
        return torch.sigmoid(linear(self.receptance, xr)) * linear(self.value, k), shift


class ChannelMix5(ChannelMix):
    """Channel mixing of RWKV-5: as `ChannelMix`, under the older names.

    A mix is the share of this token here, where it is that of the previous one in RWKV-6. Names
    and initial values of ``RWKV_ChannelMix`` in BlinkDL/RWKV-LM, RWKV-v5/src/model.py.

    Args:
        n_embd, layer_id, n_layer, n_ffn: as for `ChannelMix`.

    Raises:
        ValueError: as for `ChannelMix`.
    """

    time_mix_k: Tensor  # [1, 1, D]
    time_mix_r: Tensor  # [1, 1, D]
    mixes = ("time_mix_k", "time_mix_r")

    def _initial_mixes(self) -> tuple[Tensor, Tensor]:  # [D], [D]
        _, height = position(self.layer_id, self.n_layer)
        channel, _, _ = channels(self.n_embd)
        return channel**height, channel**height

    def _mixed(self, x: Tensor, xx: Tensor) -> tuple[Tensor, Tensor]:  # [B, T, D] each
        before = x + xx
        mix_k, mix_r = own(self.time_mix_k), own(self.time_mix_r)
        return torch.lerp(before, x, mix_k), torch.lerp(before, x, mix_r)


class ChannelMix4(ChannelMix5):
    """Channel mixing of RWKV-4: that of RWKV-5, with a larger initial key and four times D for F.

    Names and initial values of ``RWKV_ChannelMix`` in BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py.
    """

    def __init__(self, n_embd: int, layer_id: int, n_layer: int, n_ffn: int | None = None) -> None:
        n_embd = integer("n_embd", n_embd, 1)
        super().__init__(n_embd, layer_id, n_layer, 4 * n_embd if n_ffn is None else n_ffn)

    def _key_gain(self, n_embd: int, n_ffn: int) -> float:
        return max(1.0, float((n_ffn / n_embd) ** 0.5))
