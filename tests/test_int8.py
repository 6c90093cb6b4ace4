"""Int8 weights: what they lose, and that everything else is as with floating-point ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checkpoints import VERSIONS, random_model, random_tokens
from samples import relative_rms
from torch import nn

from torch_rwkv6.models import generate_text, load, load_tokenizer, save
from torch_rwkv6.nn import RWKV, Int8Linear, quantize_int8_

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests/data/rwkv6-kjv.pth"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def dequantized(model: RWKV) -> RWKV:
    """The same function by matrices of floating-point numbers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Int8Linear):
                linear = nn.Linear(*reversed(child.weight.shape), bias=False)
                linear.weight.data = child.dequantized(model.ln_out.weight.dtype)
                setattr(parent, name, linear)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 77, 45), (3, 64, 33), (9, 5, 1), (4, 1, 70), (2, 0, 3), (0, 7, 3)], ids=str
)
def test_matvec_int8(dtype: torch.dtype, sizes: tuple[int, int, int], two_threads: None) -> None:
    m, k, n = sizes
    matvec = torch.ops.rwkv6.matvec_int8

    def weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n)

    x, (numbers, scale) = torch.randn(m, k).to(dtype), weight(n, k)
    found = matvec(x, numbers, scale)
    assert found.dtype == dtype
    exact = x.double() @ (numbers.double() * scale.double()[:, None]).T
    if m:
        assert relative_rms(found, exact) < TOLERANCE[dtype]
    x, (numbers, scale) = torch.randn(m, 700).to(dtype), weight(1000, 700)
    found = matvec(x, numbers, scale)
    torch.set_num_threads(1)  # the same bits, and in every row and column those of it alone
    assert torch.equal(matvec(x, numbers, scale), found)
    assert torch.equal(matvec(x[:1], numbers[5:6], scale[5:6]), found[:1, 5:6])


def test_matvec_int8_is_an_operator_like_others() -> None:
    x, scale = torch.randn(2, 5), torch.rand(3)
    numbers = torch.randint(-128, 128, (3, 5), dtype=torch.int8)
    torch.library.opcheck(torch.ops.rwkv6.matvec_int8.default, (x, numbers, scale))
    x = x.double().requires_grad_()
    scale = scale.requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda x: torch.ops.rwkv6.matvec_int8(x, numbers, scale), x, check_forward_ad=True
    )


def test_numbers_are_off_by_at_most_half_a_step() -> None:
    weight = torch.randn(50, 33) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0
    linear = Int8Linear.of(weight)
    assert linear.scale.dtype == torch.float32
    step = weight.abs().amax(1) / 127
    error = (linear.dequantized(torch.float64) - weight.double()).abs().amax(1)
    assert (error <= step.double() * 0.5001).all()
    assert (linear.weight.abs().amax(1)[step > 0] == 127).all()
    assert Int8Linear.of(torch.zeros(3, 0)).dequantized(torch.float32).shape == (3, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="weight: expected finite numbers"):
        Int8Linear.of(weight)


def test_models_without_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="model: expected matrices"):
        quantize_int8_(quantize_int8_(random_model("6")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_models_compute_with_the_dequantized_weights(version: str, dtype: torch.dtype) -> None:
    """Prompts, decoding in place and the sequence at once."""
    model = quantize_int8_(random_model(version, dtype))
    expected_model = dequantized(quantize_int8_(random_model(version, dtype)))
    tokens = random_tokens(2, 12)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.2}
    expected, _ = expected_model(tokens)
    torch.testing.assert_close(model(tokens)[0], expected, **tolerance)
    state = model.initial_state(2)
    model.forward_(tokens[:, :9], state)
    for t in range(9, 12):
        logits = model.forward_(tokens[:, t : t + 1], state)
        torch.testing.assert_close(logits, expected[:, t], **tolerance)


@torch.no_grad()
def test_decoding_runs_the_layer_operator() -> None:
    model = quantize_int8_(random_model("6"))
    state, token = model.initial_state(2), random_tokens(2, 1)
    with torch.profiler.profile() as profile:
        model.forward_(token, state)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["rwkv6::decode_layer"] == model.n_layer
    assert calls["rwkv6::matvec_int8"] == 1  # the head
    assert "aten::linear" not in calls


@torch.no_grad()
def test_partly_quantised_layers_are_heard() -> None:
    model = random_model("6")
    quantize_int8_(model.blocks[1].ffn)
    model.blocks[2].ffn.key.register_forward_hook(lambda module, args, out: 2 * out)
    expected, new = model(random_tokens(2, 3))
    state = model.initial_state(2)
    for t in range(3):
        logits = model.forward_(random_tokens(2, 3)[:, t : t + 1], state)
    torch.testing.assert_close(logits, expected[:, -1])
    torch.testing.assert_close(state.wkv, new.wkv)


@torch.no_grad()
def test_it_compiles() -> None:
    torch._dynamo.reset()
    model = quantize_int8_(random_model("6"))
    tokens = random_tokens(2, 5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0])
    exported = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(exported(tokens)[0], model(tokens)[0])


def test_gradients_reach_what_is_not_quantised() -> None:
    model = quantize_int8_(load(random_model("6").state_dict(), train_state=True))
    loss = nn.functional.cross_entropy(
        model(random_tokens(1, 9))[0][0, :-1], random_tokens(1, 9)[0, 1:]
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.blocks[0].att.time_state.grad.abs().max() > 0


def test_scales_stay_float32_wherever_the_model_goes() -> None:
    model = quantize_int8_(random_model("6"))
    scale = model.head.scale.clone()
    model = model.to(torch.bfloat16).float().half().to("cpu")
    assert torch.equal(model.head.scale, scale)
    assert model.head.weight.dtype == torch.int8
    assert model.emb.weight.dtype == torch.float16
    copy = quantize_int8_(random_model("6", torch.float16))
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.head.dequantized(torch.float32), model.head.dequantized(torch.float32))
    assert model.to("meta").head.scale.is_meta


def test_a_state_dict_is_loaded_into_a_model_without_memory() -> None:
    model, tokens = quantize_int8_(random_model("6")), random_tokens(2, 3)
    empty = quantize_int8_(random_model("6").to("meta")).to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(tokens)[0], model(tokens)[0])


def test_loading_quantises_and_saving_refuses(tmp_path: Path) -> None:
    model = load(random_model("6", torch.bfloat16).state_dict(), dtype="int8")
    assert isinstance(model.head, Int8Linear)
    assert isinstance(model.blocks[2].ffn.value, Int8Linear)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match=r"int8 as .*a model is saved before it is quantised"):
        save(model, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"dtype: expected .* or \"int8\", got 'int4'"):
        load(random_model("6").state_dict(), dtype="int4")


@torch.no_grad()
def test_text_loses_less_than_a_hundredth_of_its_bits() -> None:
    """Bits per byte of a trained model on text, against the same model in bfloat16."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from corpus import read_text
    finally:
        sys.path.pop(0)
    text = torch.frombuffer(bytearray(read_text(None)[-40_000:]), dtype=torch.uint8).long()
    rows = text[: len(text) // 500 * 500].view(-1, 500)

    def bits(model: RWKV) -> float:
        logits, _ = model(rows[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        return loss.item() / torch.tensor(2.0).log().item()

    half = bits(load(CHECKPOINT, dtype=torch.bfloat16))
    assert 1 < half < 3  # it has learnt English
    assert (
        bits(load(load(CHECKPOINT, dtype=torch.bfloat16).state_dict(), dtype="int8")) < 1.01 * half
    )


def test_it_writes_text() -> None:
    model = load(CHECKPOINT, dtype="int8").eval()
    text = "".join(generate_text(model, load_tokenizer("bytes"), "In the ", 60, temperature=0))
    exact = load(CHECKPOINT).eval()
    expected = "".join(generate_text(exact, load_tokenizer("bytes"), "In the ", 60, temperature=0))
    assert text[:10] == expected[:10]
