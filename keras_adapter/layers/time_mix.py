"""Time mixing: the recurrent half of an RWKV-6 block, around the WKV6 operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_adapter.checks import FLOAT_DTYPES, MAX_HEAD_SIZE, flag, number
from keras_adapter.layers.mix import Mix, check_tensor, epsilon, given_mask, input_width
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
        high_level: True computes WKV with keras.ops, False with the native kernels where this
            backend has them; None is what the environment variable ``OPS_KERNEL`` says.

    Raises:
        TypeError: an option of another type.
        ValueError: layer_id not below n_layer, a size below 1, a head size above 256, an epsilon
            that is not finite or below 0, or head_size not dividing D.
    """

    official: ClassVar[Mapping[str, str]] = {
        **{f"time_maa_{x}": f"time_maa_{x}" for x in ("x", "w", "k", "v", "r", "g", "w1", "w2")},
        **{name: name for name in ("time_decay", "time_decay_w1", "time_decay_w2", "time_faaaa")},
        "ln_x.weight": "ln_x_weight",
        "ln_x.bias": "ln_x_bias",
        "receptance.weight": "receptance",
        "key.weight": "key",
        "value.weight": "value",
        "gate.weight": "gate",
        "output.weight": "output_map",
    }

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
        high_level: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer_id, n_layer, return_state, **kwargs)
        self.head_size = number("head_size", head_size, MAX_HEAD_SIZE)
        self.lora_mix = None if lora_mix is None else number("lora_mix", lora_mix)
        self.lora_decay = None if lora_decay is None else number("lora_decay", lora_decay)
        self.ln_x_eps = epsilon("ln_x_eps", ln_x_eps)
        self.high_level = None if high_level is None else flag("high_level", high_level)

    def build(self, input_shape: Any) -> None:
        self.width = width = input_width(input_shape)
        if width % self.head_size:
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
        decay = -6 + 5 * ramp ** (0.7 + 1.3 * depth)
        self.time_decay = self._add("time_decay", (width,), decay)
        bonus = depth * (1 - ramp) + ((n + 1) % 3 - 1) * 0.1
        heads = (width // self.head_size, self.head_size)
        self.time_faaaa = self._add("time_faaaa", heads, bonus.reshape(heads))  # u
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
        x_mask: Any | None = None,  # [B, T]
    ) -> Any:  # [B, T, D]; with return_state also [B, D] and [B, H, N, N]
        """Mixes the tokens of every sequence, from the first to the last.

        Args:
            x: input, [B, T, D].
            shift: last token of the piece before, [B, D]; None is zeros.
            state: WKV state after the piece before, [B, H, N, N] or [1, H, N, N] for all, as
                [key, value]; None is zeros. It is float32 (float64 in a float64 layer) and never
                rounded to half precision. (Keras rounds the arguments of a layer of your own around
                this one, unless that has ``autocast=False``.)
            mask: [B, T], bool or integers; where False the token is padding: the others are mixed
                as if it were not there, and its output means nothing.
            x_mask: the mask that comes with x, from an Embedding or Masking layer. Keras fills it
                in; ``mask`` goes before it.

        Returns:
            The output, [B, T, D] in the compute dtype; with ``return_state`` also the last token of
            x that is no padding, [B, D], and the state after it, [B, H, N, N]: the ``shift`` and
            ``state`` of the next piece. Without such a token they are those given.

        Raises:
            TypeError, ValueError: a dtype or shape not named above.
        """
        self._check(x, shift, state, mask, x_mask)
        mask = given_mask(mask, x_mask)
        x, xx, shift = self._shift(x, shift, mask)
        batch, tokens, width = ops.shape(x)
        heads = (batch, tokens, width // self.head_size, self.head_size)

        maa_x, *maa = self._cast(
            self.time_maa_x,
            self.time_maa_w,
            self.time_maa_k,
            self.time_maa_v,
            self.time_maa_r,
            self.time_maa_g,
        )
        maa_w1, maa_w2 = self._cast(self.time_maa_w1, self.time_maa_w2)
        lora = ops.tanh(ops.matmul(x + xx * maa_x, maa_w1))
        lora = ops.reshape(lora, (batch, tokens, 5, lora.shape[2] // 5))
        (lora,) = self._cast(lora)
        lora = ops.einsum("btqm,qmd->qbtd", lora, maa_w2)  # [5, B, T, D]
        xw, xk, xv, xr, xg = (x + xx * (a + mix) for a, mix in zip(maa, ops.unstack(lora, 5)))

        # w goes through two exponentials: it is summed in at least float32, whatever x is
        decay_w1, decay_w2 = self._cast(self.time_decay_w1, self.time_decay_w2)
        w = ops.matmul(ops.tanh(ops.matmul(xw, decay_w1)), decay_w2)
        w = ops.cast(self.time_decay, self.wide_dtype) + ops.cast(w, self.wide_dtype)
        r, k, v, g = self._cast(self.receptance(xr), self.key(xk), self.value(xv), self.gate(xg))
        if mask is not None:
            real = ops.expand_dims(mask, -1)
            k, v = (ops.where(real, a, ops.zeros_like(a)) for a in (k, v))
            w = ops.where(real, w, ops.full_like(w, -1e9))
        if self.compute_dtype == "float16":  # has no room for y, which the norm brings to size
            r, k, v = (ops.cast(a, self.wide_dtype) for a in (r, k, v))
        u = ops.cast(self.time_faaaa, self.wide_dtype)
        state = None if state is None else ops.cast(state, self.wide_dtype)
        r, k, v, w = (ops.reshape(a, heads) for a in (r, k, v, w))
        y, state = wkv(r, k, v, w, u, state, high_level=self.high_level)
        y = ops.reshape(self._norm(y), (batch, tokens, width))
        weight, bias = self._cast(self.ln_x_weight, self.ln_x_bias)
        (y,) = self._cast(self.output_map((y * weight + bias) * ops.silu(g)))
        return (y, shift, state) if self.return_state else y

    def _norm(self, y: Any) -> Any:  # [B, T, H, N]
        """GroupNorm of each token, a group per head, in at least float32; before its weights."""
        groups = ops.cast(y, self.wide_dtype)
        # not ops.moments: its difference of squares may be negative
        groups = groups - ops.mean(groups, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(groups), axis=-1, keepdims=True)
        (normed,) = self._cast(groups * ops.rsqrt(variance + self.ln_x_eps))
        return normed

    def _outputs(self, shape: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], str]]:
        batch, _, width = shape
        state = (batch, width // self.head_size, self.head_size, self.head_size)
        return [*super()._outputs(shape), (state, self.wide_dtype)]

    def _check(
        self,
        x: Any,  # [B, T, D]
        shift: Any | None = None,  # [B, D]
        state: Any | None = None,  # [B, H, N, N]
        mask: Any | None = None,  # [B, T]
        x_mask: Any | None = None,  # [B, T]
    ) -> None:
        self._check_tokens(x, shift, mask, x_mask)
        if state is None:
            return
        width = x.shape[2]
        shape = (x.shape[0], width // self.head_size, self.head_size, self.head_size)
        if tuple(getattr(state, "shape", ()))[:1] == (1,):
            shape = (1, *shape[1:])  # one for all
        check_tensor("state", state, FLOAT_DTYPES, shape, "[B, H, N, N]")

    def get_config(self) -> dict[str, Any]:
        names = ("head_size", "lora_mix", "lora_decay", "ln_x_eps", "high_level")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
