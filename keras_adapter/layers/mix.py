"""What the two mixing layers share: position in the model, official weights, token shift."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_adapter.checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_shape,
    described,
    dtype_of,
    flag,
    number,
)

Weights = Mapping[str, np.ndarray[Any, Any]]

_MASK_DTYPES = ("bool", "int8", "uint8", "int32", "int64")


class Mix(keras.layers.Layer):
    """The base of both layers.

    Keras casts all floating-point arguments of a layer to its compute dtype, which would round the
    carried state. So this is switched off (``autocast``) and `call` casts x and the weights itself,
    also for wrappers such as TimeDistributed, which call nothing but `call`.
    """

    # official name: attribute; a weight, or a Dense layer whose transposed kernel it is
    official: ClassVar[Mapping[str, str]]
    _check: Callable[..., None]  # raises TypeError or ValueError for arguments of `call`

    def __init__(self, layer_id: int, n_layer: int, return_state: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.autocast = False
        self.n_layer = number("n_layer", n_layer)
        if isinstance(layer_id, bool) or not hasattr(layer_id, "__index__"):
            raise TypeError(f"layer_id: expected an int, got {described(layer_id)}")
        if not 0 <= layer_id < n_layer:
            raise ValueError(f"layer_id: expected 0 to n_layer - 1 = {n_layer - 1}, got {layer_id}")
        self.layer_id = int(layer_id)
        self.return_state = flag("return_state", return_state)
        self.supports_masking = True
        self._map_policies: dict[str, Any] = {}  # of maps that are quantized, by layer name

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("layer_id", "n_layer", "return_state")}
        return {**super().get_config(), **own}

    def get_build_config(self) -> dict[str, Any] | None:
        """For saving: also which maps are quantized and how, so that loading builds them so."""
        config: dict[str, Any] | None = super().get_build_config()
        if config is None or not self.built:
            return config
        maps = [x for x in self._attributes().values() if isinstance(x, keras.layers.Dense)]
        policies = {x.name: x.dtype_policy.name for x in maps if x.quantization_mode is not None}
        return {**config, "map_policies": policies}

    def build_from_config(self, config: dict[str, Any]) -> None:
        self._map_policies = config.get("map_policies", {})
        super().build_from_config({k: v for k, v in config.items() if k != "map_policies"})

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """Under a policy such as "int8_from_float32" it is the maps that are quantized."""
        return self.call(*args, **kwargs)

    # Shapes and dtypes of the outputs, the same for tensors and for KerasTensors

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the output for x of this shape; with ``return_state`` all its shapes."""
        input_width(input_shape)
        shapes = tuple(shape for shape, _ in self._outputs(tuple(input_shape)))
        return shapes if self.return_state else shapes[0]

    def compute_output_spec(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        self._check(x, *args, **kwargs)
        outputs = tuple(keras.KerasTensor(*output) for output in self._outputs(tuple(x.shape)))
        return outputs if self.return_state else outputs[0]

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        if not self.return_state:
            return previous_mask
        return (previous_mask, *(None for _ in self._outputs(tuple(inputs.shape))[1:]))

    def _outputs(self, shape: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], str]]:
        """Shape and dtype of the output and of the states for the next piece."""
        batch, _, width = shape
        return [(shape, self.compute_dtype), ((batch, width), self.compute_dtype)]

    def _check_tokens(
        self,
        x: Any,  # [B, T, D]
        shift: Any | None = None,  # [B, D]
        mask: Any | None = None,  # [B, T]
        x_mask: Any | None = None,  # [B, T]
    ) -> None:
        """Raises TypeError or ValueError for an argument that does not fit."""
        width = input_width(x.shape)
        if self.built and width != self.width:
            raise ValueError(f"x: expected the width D = {self.width}, got shape {tuple(x.shape)}")
        batch, tokens, _ = x.shape
        if shift is not None:
            check_tensor("shift", shift, FLOAT_DTYPES, (batch, width), "[B, D]")
        for name, given in (("mask", mask), ("x_mask", x_mask)):
            if given is not None:
                check_tensor(name, given, _MASK_DTYPES, (batch, tokens), "[B, T]")

    # Weights under their official names

    def get_official_weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """The weights as NumPy arrays under the names and shapes of torch_rwkv6.nn.

        ``module.load_state_dict({n: torch.tensor(x) for n, x in weights.items()})`` takes them.
        What ``enable_lora`` added to a map is merged into it, and a quantized map is given back as
        the values that it computes with.

        Returns:
            float32 arrays, float64 those of a float64 layer.

        Raises:
            ValueError: the layer is not built, or a map is quantized in another way than "int8",
                "int4" or "float8".
        """
        return {name: self._official_value(name) for name in self._attributes()}

    def set_official_weights(self, weights: Weights) -> None:
        """Takes the weights of torch_rwkv6.nn: ``{n: x.numpy() for n, x in state_dict.items()}``.

        Args:
            weights: arrays by official name.

        Raises:
            ValueError: the layer is not built, a missing or surplus name, a shape that does not
                fit, values that are not real numbers, or a map with LoRA or a quantized one, whose
                values are not its own alone: set them before. Nothing is set then.
        """
        attributes = self._attributes()
        if set(weights) != set(attributes):
            missing, surplus = set(attributes) - set(weights), set(weights) - set(attributes)
            raise ValueError(f"weights: missing {sorted(missing)}, surplus {sorted(surplus)}")
        values = {}
        for name, attribute in attributes.items():
            if isinstance(attribute, keras.layers.Dense) and not _is_plain(attribute):
                how = "has LoRA" if attribute.lora_enabled else "is quantized"
                raise ValueError(f"weights: {name}: its layer {how}; set the weights before that")
            try:
                value = np.asarray(weights[name]).astype("float64")
            except (TypeError, ValueError) as error:
                raise ValueError(f"weights: {name}: expected real numbers ({error})") from None
            shape = self._official_shape(name, attribute)
            if value.shape != shape:
                raise ValueError(f"weights: {name}: expected shape {shape}, got {value.shape}")
            values[name] = value
        for name, attribute in attributes.items():
            if isinstance(attribute, keras.layers.Dense):
                attribute.kernel.assign(values[name].T)
            else:
                attribute.assign(values[name].reshape(attribute.shape))

    def _attributes(self) -> dict[str, Any]:
        """Our weights and Dense layers by official name."""
        if not self.built:
            raise ValueError(f"{self.name}: has no weights yet; call it or build it first")
        return {name: getattr(self, attribute) for name, attribute in self.official.items()}

    @staticmethod
    def _official_shape(name: str, attribute: Any) -> tuple[int, ...]:
        if isinstance(attribute, keras.layers.Dense):
            width_in, width_out = attribute.kernel.shape
            return width_out, width_in
        # one value per channel: [1, 1, D] but for the norm's
        per_channel = len(attribute.shape) == 1 and not name.startswith("ln_x")
        return (1, 1, *attribute.shape) if per_channel else tuple(attribute.shape)

    def _official_value(self, name: str) -> np.ndarray[Any, Any]:
        attribute = getattr(self, self.official[name])
        if isinstance(attribute, keras.layers.Dense):
            return np.ascontiguousarray(_matrix(name, attribute).T)
        return _array(attribute).reshape(self._official_shape(name, attribute))

    def _add(self, name: str, shape: tuple[int, ...], start: Any) -> Any:
        """A weight that starts at an array of its shape, or by a Keras initializer."""
        return self.add_weight(name=name, shape=shape, initializer=_initializer(start))

    def _dense(self, name: str, width_in: int, units: int, gain: float | None) -> Any:
        """A linear map without bias; gain None starts at zero."""
        start = keras.initializers.Orthogonal(gain) if gain is not None else "zeros"
        dense = keras.layers.Dense(
            units,
            use_bias=False,
            kernel_initializer=_initializer(start),
            name=name,
            dtype=self._map_policies.get(name, self.dtype_policy),
        )
        dense.build((None, None, width_in))
        return dense

    # The computation

    @property
    def wide_dtype(self) -> str:
        """The dtype of the state, and of sums that must not be rounded to half precision."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def _cast(self, *tensors: Any) -> list[Any]:
        """In the compute dtype; keras.ops' products of float64 are float32 on some backends."""
        return [ops.cast(x, self.compute_dtype) for x in tensors]

    def _shift(
        self,
        x: Any,  # [B, T, D]
        shift: Any | None,  # [B, D]
        mask: Any | None,  # [B, T]
    ) -> tuple[Any, Any, Any]:  # [B, T, D], [B, T, D], [B, D]
        """x with zeros for padding, the previous token minus this one, and the last token.

        The previous and the last token are never padding.
        """
        (x,) = self._cast(x)
        if mask is not None:
            x = ops.where(ops.expand_dims(mask, -1), x, ops.zeros_like(x))
        batch, _, width = ops.shape(x)
        first = ops.zeros((batch, width), x.dtype) if shift is None else ops.cast(shift, x.dtype)
        tokens = ops.concatenate([ops.expand_dims(first, 1), x], axis=1)  # [B, T + 1, D]
        if mask is not None:
            tokens = ops.take_along_axis(tokens, ops.expand_dims(_last_real(mask), -1), axis=1)
        return x, tokens[:, :-1] - x, tokens[:, -1]


def _last_real(mask: Any) -> Any:  # [B, T] -> [B, T + 1]
    """For every position in [shift, *tokens], that of the last one so far that is no padding."""
    real = ops.cast(mask, "int32")
    count = ops.pad(ops.cumsum(real, axis=1), [[0, 0], [1, 0]])  # [B, T + 1], real tokens so far
    place = ops.cumsum(ops.ones_like(real), axis=1)  # [B, T], 1 to T
    # the places of the real tokens in their order, then those of padding, which no count reaches
    places = ops.sort(ops.where(mask, place, place + ops.shape(real)[1]), axis=1)
    return ops.take_along_axis(ops.pad(places, [[0, 0], [1, 0]]), count, axis=1)


def _initializer(start: Any) -> Any:
    """Of an array or a Keras initializer, drawn in float32: not every dtype has a QR everywhere."""

    def initializer(shape: Any, dtype: Any = None) -> Any:
        if isinstance(start, np.ndarray):
            return ops.convert_to_tensor(start, dtype=dtype)
        return ops.cast(keras.initializers.get(start)(shape, "float32"), dtype or "float32")

    return initializer


def _is_plain(dense: Any) -> bool:
    """Whether a Dense layer multiplies with its kernel as it stands."""
    return dense.quantization_mode is None and not dense.lora_enabled


def _matrix(name: str, dense: Any) -> np.ndarray[Any, Any]:  # [in, out]
    """What a Dense layer multiplies with: LoRA merged in, quantized values dequantized."""
    if _is_plain(dense):
        return _array(dense.kernel)
    if dense.quantization_mode not in (None, "int8", "int4", "float8"):
        raise ValueError(
            f"{name}: is quantized as {dense.quantization_mode!r} and cannot be given back; get "
            "the official weights before"
        )
    matrix = _dequantized(dense)
    if not dense.lora_enabled:
        return matrix
    a, b = (_array(x).astype("float64") for x in (dense.lora_kernel_a, dense.lora_kernel_b))
    merged: np.ndarray[Any, Any] = matrix + dense.lora_alpha / dense.lora_rank * (a @ b)
    return merged.astype(matrix.dtype)


def _dequantized(dense: Any) -> np.ndarray[Any, Any]:  # [in, out]
    """The kernel of a Dense layer without its LoRA."""
    variables = {variable.name: variable for variable in dense.weights}
    if dense.quantization_mode in (None, "float8"):  # float8 rounds when it computes
        return _array(variables["kernel"])
    # how integers are packed and scaled is Keras's own; a copy of the layer in float32 applies them
    # to the unit vectors
    config = {**dense.get_config(), "kernel_initializer": "zeros"}
    config["dtype"] = f"{dense.dtype_policy.name.split('_from_')[0]}_from_float32"
    config.pop("lora_rank", None)
    config.pop("lora_alpha", None)
    copy = keras.layers.Dense.from_config(config)
    width_in = dense.input_spec.axes[-1]
    copy.build((None, width_in))
    for variable in copy.weights:
        variable.assign(variables[variable.name])
    return _array(copy(ops.eye(width_in, dtype="float32")))


def _array(x: Any) -> np.ndarray[Any, Any]:
    """As NumPy in at least float32."""
    wide = "float64" if dtype_of(x) == "float64" else "float32"
    return np.array(ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(x), wide)))


def given_mask(mask: Any | None, x_mask: Any | None) -> Any | None:  # [B, T] each
    """The mask that counts, as bool."""
    mask = x_mask if mask is None else mask
    return None if mask is None else ops.cast(mask, "bool")


def input_width(shape: Any) -> int:
    """D, after checking the shape of x."""
    if len(shape) != 3 or shape[2] is None:
        raise ValueError(f"x: expected 3 dimensions (B, T, D) with a known D, got {tuple(shape)}")
    return int(shape[2])


def check_tensor(
    name: str, x: Any, dtypes: tuple[str, ...], shape: tuple[Any, ...], description: str
) -> None:
    """Raises TypeError or ValueError for an argument that does not fit."""
    if not hasattr(x, "dtype"):
        raise TypeError(f"{name}: expected a tensor, got {described(x)}")
    check_dtype(name, x, dtypes)
    check_shape(name, x, shape, description)


def epsilon(name: str, value: Any) -> float:
    """An option that is a number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {described(value)}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return float(value)
