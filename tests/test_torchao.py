"""Models quantised by torchao: prompts and decoding, module by module, with its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import random_model, random_tokens
from samples import relative_rms
from test_one_door import assert_decoding_is_forward
from torch import nn

from torch_rwkv6.nn import RWKV

torchao = pytest.importorskip("torchao.quantization")
EIGHT_BITS = torchao.Int8WeightOnlyConfig()
FOUR_BITS = torchao.Int8DynamicActivationIntxWeightConfig(  # activations of eight bits: 8da4w
    weight_dtype=torch.int4, weight_granularity=torchao.PerGroup(32)
)


def dequantised(model: RWKV) -> RWKV:
    """The same weights as floating-point numbers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("config", "tolerance"), [(EIGHT_BITS, 1e-5), (FOUR_BITS, 0.03)], ids=["int8", "8da4w"]
)
@pytest.mark.parametrize("version", ["4", "5.2", "6"])
def test_every_matrix_is_quantised_and_acts(version: str, config: object, tolerance: float) -> None:
    model = random_model(version, n_layer=2)
    torchao.quantize_(model, config)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 2 * {"4": 7, "5.2": 8, "6": 8}[version] + 1
    assert all(type(m.weight).__module__.startswith("torchao.") for m in linears)
    assert_decoding_is_forward(model)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        found, expected = model(tokens)[0], dequantised(model)(tokens)[0]
        assert relative_rms(found, expected) < tolerance
        assert relative_rms(found, random_model(version, n_layer=2)(tokens)[0]) > 1e-3
