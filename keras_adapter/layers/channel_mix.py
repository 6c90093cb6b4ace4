"""Channel mixing: the feed-forward half of an RWKV-6 block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_adapter.checks import number
from keras_adapter.layers.mix import Mix, given_mask, input_width

__all__ = ["RWKV6ChannelMix"]


@keras.saving.register_keras_serializable(package="keras_adapter")
class RWKV6ChannelMix(Mix):
    """RWKV-6 channel mixing: a squared-ReLU MLP with a sigmoid gate over shifted tokens.

    Peng et al., "Eagle and Finch", arXiv:2404.05892, section 3.2; names and initial values of
    ``RWKV_CMix_x060`` in BlinkDL/RWKV-LM, RWKV-v5/src/model.py, as in `torch_rwkv6.nn.ChannelMix`.

    Args:
        layer_id: index of the layer, 0 to n_layer - 1; the initial values depend on it.
        n_layer: number of layers of the model.
        n_ffn: hidden width F; None is ``int(3.5 * D) // 32 * 32``, which needs a D of at least 10.
        return_state: also return what the next piece of the sequence goes on from.

    Raises:
        TypeError: an option that is no integer.
        ValueError: layer_id not below n_layer, or a hidden width below 1.
    """

    official: ClassVar[Mapping[str, str]] = {
        "time_maa_k": "time_maa_k",
        "time_maa_r": "time_maa_r",
        "key.weight": "key",
        "receptance.weight": "receptance",
        "value.weight": "value",
    }

    _check = Mix._check_tokens

    def __init__(
        self,
        layer_id: int,
        n_layer: int,
        n_ffn: int | None = None,
        *,
        return_state: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer_id, n_layer, return_state, **kwargs)
        self.n_ffn = None if n_ffn is None else number("n_ffn", n_ffn)

    def build(self, input_shape: Any) -> None:
        self.width = width = input_width(input_shape)
        hidden = int(3.5 * width) // 32 * 32 if self.n_ffn is None else self.n_ffn
        if hidden < 1:
            raise ValueError(
                f"n_ffn: int(3.5 * D) // 32 * 32 is 0 for an x of width D = {width}; from D = 10 "
                "it is at least 32, below pass n_ffn"
            )
        maa = 1 - (np.arange(width) / width) ** ((1 - self.layer_id / self.n_layer) ** 3)
        self.time_maa_k = self._add("time_maa_k", (width,), maa)
        self.time_maa_r = self._add("time_maa_r", (width,), maa)
        self.key = self._dense("key", width, hidden, 1.0)
        self.receptance = self._dense("receptance", width, width, None)
        self.value = self._dense("value", hidden, width, None)
        self.built = True

    def call(
        self,
        x: Any,  # [B, T, D]
        shift: Any | None = None,  # [B, D]
        mask: Any | None = None,  # [B, T]
        x_mask: Any | None = None,  # [B, T]
    ) -> Any:  # [B, T, D]; with return_state also [B, D]
        """Mixes the channels of every token.

        Args:
            x: input, [B, T, D].
            shift: last token of the piece before, [B, D]; None is zeros.
            mask: [B, T], bool or integers; where False the token is padding: the others are mixed
                as if it were not there, and its output means nothing.
            x_mask: the mask that comes with x, from an Embedding or Masking layer. Keras fills it
                in; ``mask`` goes before it.

        Returns:
            The output, [B, T, D] in the compute dtype; with ``return_state`` also the last token of
            x that is no padding, [B, D], the ``shift`` of the next piece. Without such a token it
            is the given shift.

        Raises:
            TypeError, ValueError: a dtype or shape not named above.
        """
        self._check(x, shift, mask, x_mask)
        x, xx, shift = self._shift(x, shift, given_mask(mask, x_mask))
        maa_k, maa_r = self._cast(self.time_maa_k, self.time_maa_r)
        k = ops.square(ops.relu(self.key(x + xx * maa_k)))  # [B, T, F]
        (y,) = self._cast(ops.sigmoid(self.receptance(x + xx * maa_r)) * self.value(k))
        return (y, shift) if self.return_state else y

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "n_ffn": self.n_ffn}
