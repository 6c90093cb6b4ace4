"""Time mixing: the recurrent half of an RWKV-6 block, around the WKV6 operator."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_adapter.layers.mix import Mix, input_width
from keras_adapter.ops import wkv

__all__ = ["RWKV6TimeMix"]


@keras.saving.register_keras_serializable(package="keras_adapter")
class RWKV6TimeMix(Mix):
    """RWKV-6 time mixing: data-dependent token shift and decay, then WKV6, GroupNorm and a gate.

    Peng et al., "Eagle and Finch", arXiv:2404.05892, section 4; names and initial values of
    ``RWKV_Tmix_x060`` in BlinkDL/RWKV-LM, RWKV-v5/src/model.py, as in `torch_rwkv6.nn.TimeMix`.

    Args:
        layer_id: index of the layer, 0 to n_layer - 1; the initial values depend on it.
        n_layer: number of layers of the model.
        head_size: N; must divide the width D of the input.
        lora_mix: rank of the data-dependent token shift; None is 32, or 64 from D = 4096.
        lora_decay: rank of the data-dependent decay; None is 64, or 128 from D = 4096.
        ln_x_eps: epsilon of the GroupNorm. Official checkpoints have 64e-5.
        return_state: also return what the next piece of the sequence goes on from.

    Raises:
        ValueError: layer_id not below n_layer, or head_size not dividing D.
    """

    def __init__(
        self,
        layer_id: int,
        n_layer: int,
        head_size: int = 64,
        *,
        lora_mix: int | None = None,
        lora_decay: int | None = None,
        ln_x_eps: float = 64e-5,
        return_state: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer_id, n_layer, return_state, **kwargs)
        self.head_size, self.ln_x_eps = head_size, ln_x_eps
        self.lora_mix, self.lora_decay = lora_mix, lora_decay

    def build(self, input_shape: Any) -> None:
        width = input_width(input_shape)
        if self.head_size < 1 or width % self.head_size:
            raise ValueError(f"head_size: expected a divisor of {width}, got {self.head_size}")
        wide = width >= 4096
        mix = (64 if wide else 32) if self.lora_mix is None else self.lora_mix
        lora_decay = (128 if wide else 64) if self.lora_decay is None else self.lora_decay
        depth = self.layer_id / max(self.n_layer - 1, 1)  # 0 to 1; 0 for a model of one layer
        height = 1 - self.layer_id / self.n_layer  # 1 to almost 0
        n = np.arange(width)
        channel, ramp = n / width, n / max(width - 1, 1)
        maa = 1 - channel**height
        small = keras.initializers.RandomUniform(-0.01, 0.01)

        for name, value in (
            ("time_maa_x", maa),
            ("time_maa_w", maa),
            ("time_maa_k", maa),
            ("time_maa_v", maa - 0.3 * depth),
            ("time_maa_r", 1 - channel ** (0.5 * height)),
            ("time_maa_g", 1 - channel ** (0.5 * height)),
        ):
            setattr(self, name, self._add(name, (width,), value))
        # mixed precision leaves the decay and the bonus as they are
        decay = -6 + 5 * ramp ** (0.7 + 1.3 * depth)
        self.time_decay = self._add("time_decay", (width,), decay, autocast=False)
        bonus = depth * (1 - ramp) + ((n + 1) % 3 - 1) * 0.1
        heads = (width // self.head_size, self.head_size)
        self.time_faaaa = self._add("time_faaaa", heads, bonus.reshape(heads), autocast=False)  # u
        self.time_maa_w1 = self._add("time_maa_w1", (width, 5 * mix), "zeros")
        self.time_maa_w2 = self._add("time_maa_w2", (5, mix, width), small)  # w, k, v, r, g
        self.time_decay_w1 = self._add("time_decay_w1", (width, lora_decay), "zeros")
        self.time_decay_w2 = self._add("time_decay_w2", (lora_decay, width), small)
        gain = ((1 + self.layer_id) / self.n_layer) ** 0.7
        self.ln_x_weight = self._add("ln_x_weight", (width,), np.full(width, gain))
        self.ln_x_bias = self._add("ln_x_bias", (width,), "zeros")
        self.receptance = self._dense("receptance", width, width, 1.0)
        self.key = self._dense("key", width, width, 0.1)
        self.value = self._dense("value", width, width, 1.0)
        self.gate = self._dense("gate", width, width, 0.1)
        self.output_map = self._dense("output", width, width, None)
        self.built = True

    def call(
        self,
        x: Any,  # [B, T, D]
        shift: Any | None = None,  # [B, D]
        state: Any | None = None,  # [B, H, N, N], [key, value]
        mask: Any | None = None,  # [B, T]
    ) -> Any:  # [B, T, D]; with return_state also [B, D] and [B, H, N, N]
        """Mixes the tokens of every sequence, from the first to the last.

        Args:
            x: input, [B, T, D].
            shift: last token of the piece before, [B, D]; None is zeros.
            state: WKV state after the piece before, [B, H, N, N] or [1, H, N, N] for all, as
                [key, value], float32; None is zeros.
            mask: [B, T] bool; where False the token is padding: it counts as zeros and leaves the
                state as it is.

        Returns:
            The output, [B, T, D]; with ``return_state`` also the last token of x, [B, D], and the
            state after it, [B, H, N, N]: the ``shift`` and ``state`` of the next piece.
        """
        batch, tokens, width = ops.shape(x)
        heads = (batch, tokens, width // self.head_size, self.head_size)
        keep = None if mask is None else ops.expand_dims(mask, -1)
        if keep is not None:
            x = ops.where(keep, x, ops.zeros_like(x))
        xx, shift = self._shift(x, shift)

        lora = ops.tanh(ops.matmul(x + xx * self.time_maa_x, self.time_maa_w1))
        lora = ops.reshape(lora, (batch, tokens, 5, lora.shape[2] // 5))
        lora = ops.einsum("btqm,qmd->qbtd", lora, self.time_maa_w2)  # [5, B, T, D]
        xw, xk, xv, xr, xg = (
            x + xx * (maa + mix)
            for maa, mix in zip(
                (
                    self.time_maa_w,
                    self.time_maa_k,
                    self.time_maa_v,
                    self.time_maa_r,
                    self.time_maa_g,
                ),
                ops.unstack(lora, 5),
            )
        )

        # w goes through two exponentials: it is summed in at least float32, whatever x is
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        w = ops.matmul(ops.tanh(ops.matmul(xw, self.time_decay_w1)), self.time_decay_w2)
        w = ops.cast(self.time_decay, wide) + ops.cast(w, wide)
        r, k, v, g = self.receptance(xr), self.key(xk), self.value(xv), self.gate(xg)
        if keep is not None:
            k, v = (ops.where(keep, a, ops.zeros_like(a)) for a in (k, v))
            w = ops.where(keep, w, -1e9)
        u = ops.cast(self.time_faaaa, wide)
        r, k, v, w = (ops.reshape(a, heads) for a in (r, k, v, w))
        y, state = wkv(r, k, v, w, u, state)
        y = self._norm(ops.reshape(y, (batch, tokens, width)))
        y = self.output_map(y * ops.silu(g))
        return (y, shift, state) if self.return_state else y

    def _norm(self, y: Any) -> Any:  # [B, T, D]
        """GroupNorm of each token, a group per head, in at least float32."""
        shape = ops.shape(y)
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        groups = ops.cast(ops.reshape(y, (*shape[:2], -1, self.head_size)), wide)
        mean, variance = ops.moments(groups, axes=-1, keepdims=True)
        groups = (groups - mean) * ops.rsqrt(variance + self.ln_x_eps)
        normed = ops.cast(ops.reshape(groups, shape), y.dtype)
        return normed * self.ln_x_weight + self.ln_x_bias

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return (previous_mask, None, None) if self.return_state else previous_mask

    def get_config(self) -> dict[str, Any]:
        names = ("head_size", "lora_mix", "lora_decay", "ln_x_eps")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
