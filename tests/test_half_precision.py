"""Many tokens at once in bfloat16, float16 and int8, where the CPU multiplies none of these.

Their products are computed in float32 then, a block of the weight at a time.
"""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import random_model, random_tokens
from samples import relative_rms
from torch import Tensor, nn

from torch_rwkv6.nn import Int8Linear, fast_path, quantize_int8_

HALF = (torch.bfloat16, torch.float16)
ROUNDED = {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}  # one number of that dtype


@pytest.fixture(autouse=True)
def _no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_path, "has_products_of", lambda dtype: dtype not in HALF)
    monkeypatch.setattr(fast_path, "BLOCK", 100)  # several blocks of rows, and a rest


def exact(layer: Int8Linear) -> Tensor:
    return layer.weight.double() * layer.scale.double()[:, None]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(9, 45, 77), (20, 5, 1), (16, 3, 300), (9, 0, 7)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_a_matrix(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    M, N, K = sizes
    x = torch.randn(3, M, K).to(dtype)
    layer = nn.Linear(K, N, bias=False).to(dtype)
    quantised = Int8Linear.of(layer.weight)
    for module, weight in ((layer, layer.weight.double()), (quantised, exact(quantised))):
        y = fast_path.linear(module, x)
        assert y.dtype == dtype
        assert y.shape == (3, M, N)
        assert relative_rms(y, x.double() @ weight.T) <= ROUNDED[dtype]


@torch.no_grad()
def test_int8_beside_float64() -> None:
    layer, x = Int8Linear.of(torch.randn(45, 77)), torch.randn(9, 77, dtype=torch.float64)
    assert relative_rms(fast_path.linear(layer, x), x @ exact(layer).T) <= 1e-12


@pytest.mark.parametrize("dtype", [*HALF, "int8"], ids=str)
@pytest.mark.parametrize("version", ["4", "5.2", "6"])
@torch.no_grad()
def test_a_model(version: str, dtype: torch.dtype | str) -> None:
    if isinstance(dtype, torch.dtype):
        model = random_model(version, dtype)
    else:
        model = quantize_int8_(random_model(version, torch.bfloat16))
    tokens = random_tokens(3, 9)
    with torch.profiler.profile() as profile:
        found, state = model(tokens)
    assert "aten::linear" not in {event.key for event in profile.key_averages()}
    expected, expected_state = copy.deepcopy(model).double()(tokens)
    rounded_often = 0.01 if dtype == torch.float16 else 0.05
    assert relative_rms(found, expected) < rounded_often
    for x, y in zip(state, expected_state, strict=True):
        assert relative_rms(x, y) < rounded_often


def test_hooks_and_gradients_go_through_the_modules() -> None:
    model, tokens = random_model("6", torch.bfloat16), random_tokens(3, 9)
    shapes = []
    model.blocks[1].att.key.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    with torch.no_grad():
        expected, _ = model(tokens)
    found, _ = model(tokens)
    assert shapes == [(3, 9, model.n_embd)] * 2
    assert relative_rms(found.detach(), expected) < 0.05
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
