"""What the two mixing layers share: place in the model, official weights, token shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

Weights = Mapping[str, np.ndarray[Any, Any]]


class Mix(keras.layers.Layer):
    """The base of both layers.

    An official tensor is a weight of the same name, `name.weight` of a linear map the transposed
    kernel of the Dense layer `name`.
    """

    def __init__(self, layer_id: int, n_layer: int, return_state: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= layer_id < n_layer:
            raise ValueError(f"layer_id: expected 0 to n_layer - 1 = {n_layer - 1}, got {layer_id}")
        self.layer_id, self.n_layer = layer_id, n_layer
        self.return_state = return_state
        self.supports_masking = True

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("layer_id", "n_layer", "return_state")}
        return {**super().get_config(), **own}

    def get_official_weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """The weights as NumPy arrays under the names and shapes of torch_rwkv6.nn.

        ``module.load_state_dict({n: torch.tensor(x) for n, x in weights.items()})`` takes them.
        """
        return {name: self._to_official(name, w) for name, w in self._official()}

    def set_official_weights(self, weights: Weights) -> None:
        """Takes the weights of torch_rwkv6.nn: ``{n: x.numpy() for n, x in state_dict.items()}``.

        Args:
            weights: NumPy arrays by official name.

        Raises:
            ValueError: a missing or surplus name, or a shape that does not fit; nothing is set.
        """
        expected = {name: self._to_official(name, w).shape for name, w in self._official()}
        if set(weights) != set(expected):
            missing, surplus = set(expected) - set(weights), set(weights) - set(expected)
            raise ValueError(f"weights: missing {sorted(missing)}, surplus {sorted(surplus)}")
        for name, shape in expected.items():
            if tuple(weights[name].shape) != shape:
                found = tuple(weights[name].shape)
                raise ValueError(f"weights: {name}: expected shape {shape}, got {found}")
        for name, variable in self._official():
            value = np.asarray(weights[name])
            variable.assign(value.T if self._is_kernel(name) else value.reshape(variable.shape))

    def _official(self) -> list[tuple[str, Any]]:
        """Official names and our variables."""
        if not self.built:
            raise ValueError(f"{self.name}: has no weights yet; call it or build it first")
        found = []
        for variable in self.weights:
            layer, name = variable.path.split("/")[-2:]
            # a Dense layer's kernel; the norm's ln_x_weight and ln_x_bias, as names have no dot
            official = f"{layer}.weight" if name == "kernel" else name.replace("ln_x_", "ln_x.")
            found.append((official, variable))
        return found

    @staticmethod
    def _is_kernel(name: str) -> bool:
        return name.endswith(".weight") and not name.startswith("ln_x")

    def _to_official(self, name: str, variable: Any) -> np.ndarray[Any, Any]:
        value: np.ndarray[Any, Any] = ops.convert_to_numpy(variable)
        if self._is_kernel(name):
            return value.T
        # one value per channel: [1, 1, D] but for the norm's
        per_channel = value.ndim == 1 and not name.startswith("ln_x")
        return value.reshape(1, 1, -1) if per_channel else value

    def _add(self, name: str, shape: tuple[int, ...], start: Any, autocast: bool = True) -> Any:
        """A weight that starts at an array of its shape, or by a Keras initializer."""

        def initializer(shape: Any, dtype: Any) -> Any:
            return ops.convert_to_tensor(start, dtype=dtype)

        given = initializer if isinstance(start, np.ndarray) else start
        return self.add_weight(name=name, shape=shape, initializer=given, autocast=autocast)

    def _dense(self, name: str, width_in: int, units: int, gain: float | None) -> Any:
        """A linear map without bias; gain None starts at zero."""
        init = keras.initializers.Orthogonal(gain) if gain is not None else "zeros"
        dense = keras.layers.Dense(
            units, use_bias=False, kernel_initializer=init, name=name, dtype=self.dtype_policy
        )
        dense.build((None, None, width_in))
        return dense

    def _shift(self, x: Any, shift: Any | None) -> tuple[Any, Any]:  # [B, T, D], [B, D]
        """The previous token minus this one [B, T, D], and the last token [B, D]."""
        batch, _, width = ops.shape(x)
        first = ops.zeros((batch, width), dtype=x.dtype) if shift is None else shift
        tokens = ops.concatenate([ops.expand_dims(ops.cast(first, x.dtype), 1), x], axis=1)
        return tokens[:, :-1] - x, tokens[:, -1]


def input_width(shape: Any) -> int:
    """D, after checking the shape of x."""
    if len(shape) != 3 or shape[2] is None:
        raise ValueError(f"x: expected 3 dimensions (B, T, D) with a known D, got {tuple(shape)}")
    return int(shape[2])
