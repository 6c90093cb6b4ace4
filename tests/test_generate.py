"""Generation, sampling, tokenizers and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import V, random_model, random_tokens
from torch import Tensor

from torch_rwkv6 import generate
from torch_rwkv6.__main__ import main
from torch_rwkv6.models import generate_text, load_tokenizer, save
from torch_rwkv6.models.sampling import Penalties, Sampling, draw, probabilities
from torch_rwkv6.models.tokenizers import Tokenizer
from torch_rwkv6.nn import RWKV6

VERSIONS = ["4", "5.2", "6"]
TEXT = "Grüße 😀 в мир 你好"


def tokens_of(*args: object, **options: object) -> Tensor:
    """All tokens that generate yields: [B, steps]."""
    return torch.stack(list(generate(*args, **options)), 1)  # type: ignore[arg-type]


# ---- sampling


def rwkv_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What PIPELINE.sample_logits of the package rwkv draws from: [V]."""
    p = torch.softmax(logits, 0)
    ordered = p.sort(descending=True).values
    cutoff = ordered[int((ordered.cumsum(0) >= sampling.top_p).double().argmax())]
    p[p < cutoff] = 0
    if 0 < sampling.top_k < len(p):
        p[p.argsort()[: -sampling.top_k]] = 0
    p = p ** (1 / sampling.temperature)
    return p / p.sum()


@pytest.mark.parametrize("vocab", [50, 3000])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.7, top_p=0.5),
        Sampling(1.5, top_k=3, top_p=0.99),
        Sampling(1.0, top_k=600, top_p=0.97),
        Sampling(2.0, top_p=0.01),
    ],
    ids=str,
)
def test_probabilities_are_those_of_the_rwkv_package(sampling: Sampling, vocab: int) -> None:
    logits = torch.randn(4, vocab) * torch.tensor([[0.1], [1.0], [3.0], [10.0]])
    p, token = probabilities(logits, sampling)
    for row in range(4):
        found = torch.zeros(vocab).scatter_(0, token[row], p[row])
        expected = rwkv_probabilities(logits[row], sampling)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    p, token = probabilities(torch.tensor([[0.0, 2.0, 1.0, -1.0]]), Sampling(top_p=0.95))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw(p, token, [generator]) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=4) / 4000
    expected = torch.zeros(4).scatter_(0, token[0], p[0])
    assert expected[3] == 0
    torch.testing.assert_close(share, expected, rtol=0, atol=0.03)


def test_penalties_are_those_of_the_rwkv_package() -> None:
    presence, frequency, decay, free = 0.3, 0.5, 0.9, {2}
    penalties = Penalties(presence, frequency, decay, free)
    logits, occurrence = torch.randn(1, 5), {}
    for token in (1, 2, 1, 4, 2, 1, 0):
        penalties.add(torch.tensor([token]), logits)
        occurrence = {t: n * decay for t, n in occurrence.items()}
        occurrence[token] = occurrence.get(token, 0.0) + (token not in free)
        expected = logits[0].clone()
        for t, n in occurrence.items():
            expected[t] -= presence + n * frequency
        torch.testing.assert_close(penalties.apply(logits)[0], expected)


def test_settings_that_do_not_fit() -> None:
    for options, name in (
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"alpha_decay": 2.0}, "alpha_decay"),
        ({"max_tokens": -1}, "max_tokens"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            generate(random_model("6"), [1], **options)  # type: ignore[arg-type]


# ---- generation


@pytest.mark.parametrize("version", VERSIONS)
def test_greedy_tokens_are_those_of_the_whole_text(version: str) -> None:
    model, prompt = random_model(version), random_tokens(2, 5)
    found = tokens_of(model, prompt, 12, temperature=0)
    text = prompt
    with torch.no_grad():
        for _ in range(12):
            text = torch.cat((text, model(text)[0][:, -1:].argmax(2)), 1)
    assert torch.equal(found, text[:, 5:])


def test_seeds_and_rows_of_a_batch() -> None:
    model = random_model("6")
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
    batch = tokens_of(model, prompts, 10, seed=7)
    assert torch.equal(batch, tokens_of(model, prompts, 10, seed=7))
    assert not torch.equal(batch, tokens_of(model, prompts, 10, seed=8))
    assert not torch.equal(tokens_of(model, prompts, 10), tokens_of(model, prompts, 10))
    for b, prompt in enumerate(prompts):
        assert torch.equal(tokens_of(model, prompt, 10, seed=7 + b)[0], batch[b])


def test_a_sequence_ends_before_its_stop_token() -> None:
    model, prompts = random_model("6"), [[3, 1], [4, 1]]
    free = tokens_of(model, prompts, 20, seed=1)
    stop = int(free[0, 4])
    found = tokens_of(model, prompts, 20, seed=1, stop_tokens=[stop])
    for row, expected in zip(found.tolist(), free.tolist(), strict=True):
        end = expected.index(stop) if stop in expected else 20
        assert row == expected[: len(row)][:end] + [-1] * (len(row) - end)
    one = tokens_of(model, prompts[0], 20, seed=1, stop_tokens=[stop])
    assert one.shape[1] == free[0].tolist().index(stop)


def test_a_state_goes_on_where_it_was_left() -> None:
    model, prompt = random_model("5.2"), [1, 2, 3]
    whole = tokens_of(model, prompt, 12, temperature=0)
    state = model.initial_state(1)
    first = tokens_of(model, prompt, 5, temperature=0, state=state)
    rest = tokens_of(model, first[:, -1:], 7, temperature=0, state=state)
    assert torch.equal(torch.cat((first, rest), 1), whole)


def test_it_streams_and_penalties_change_the_text() -> None:
    model = random_model("4")
    stream = generate(model, [1], 10**9, seed=0)
    assert next(stream).shape == (1,)
    greedy = tokens_of(model, [1], 30, temperature=0)[0]
    penalised = tokens_of(model, [1], 30, temperature=0, alpha_presence=50.0)[0]
    assert len(penalised.unique()) == 30
    assert len(greedy.unique()) < 30
    assert list(generate(model, [1], 0)) == []


def test_a_compiled_step_gives_the_same_tokens() -> None:
    torch._dynamo.reset()
    model = random_model("6")
    plain = tokens_of(model, [1, 2], 6, temperature=0)
    assert torch.equal(tokens_of(model, [1, 2], 6, temperature=0, compiled="aot_eager"), plain)


def test_prompts_that_do_not_fit() -> None:
    model = random_model("6")
    for prompt, error, message in (
        ("text", TypeError, "generate_text takes text"),
        ([], ValueError, "at least one sequence"),
        ([[1], []], ValueError, "at least one token"),
        (torch.zeros(3), ValueError, r"token ids \[B, T\]"),
        ([V], IndexError, f"from 0 to {V - 1}, got {V}"),
        ([-1], IndexError, "got -1"),
    ):
        with pytest.raises(error, match=message):
            generate(model, prompt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state: expected 2 rows"):
        generate(model, [[1], [2]], state=model.initial_state(1))
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        tokens_of(model, [1], 2)


# ---- tokenizers


def stream_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    stream = tokenizer.stream()
    return [stream.push(token) for token in tokens] + [stream.flush()]


@pytest.fixture(params=["bytes", "bytes:utf-16-le", "world", "json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    name = request.param
    if name == "world":
        pytest.importorskip("rwkv")
    if name == "json":
        tokenizers = pytest.importorskip("tokenizers")
        built = tokenizers.Tokenizer(tokenizers.models.BPE())
        built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
        )
        built.train_from_iterator(["hello world, hello words"] * 10, trainer)
        name = str(tmp_path / "tokenizer.json")
        built.save(name)
    return load_tokenizer(name)


def test_streams_never_break_a_character(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.decode(tokens) == TEXT
    pieces = stream_text(tokenizer, tokens)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(stream_text(tokenizer, [])) == ""


def test_an_incomplete_character_at_the_end() -> None:
    bytes_ = load_tokenizer("bytes")
    assert stream_text(bytes_, "aü".encode()[:2]) == ["a", "", "\ufffd"]
    assert stream_text(bytes_, b"\xffa") == ["\ufffd", "a", ""]


def test_world_tokens_and_many_texts_at_once() -> None:
    pytest.importorskip("rwkv")
    world = load_tokenizer("world")
    assert world.encode("Hello world") == [33155, 40213]
    texts = [TEXT, "Hello world", ""]
    assert world.encode_batch(texts) == [world.encode(t) for t in texts]  # type: ignore[attr-defined]


def test_tokenizers_that_there_are_not(tmp_path: Path) -> None:
    for name, error, message in (
        ("other", ValueError, "expected bytes, world or a .json file, got other"),
        ("bytes:latin-99", ValueError, "no encoding latin-99"),
        ("none.json", FileNotFoundError, "no such file: none.json"),
    ):
        if name.endswith("json"):
            pytest.importorskip("tokenizers")
        with pytest.raises(error, match=message):
            load_tokenizer(name)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path / "bad.json"))


def umlaut_model() -> RWKV6:
    r"""After \xc3 always \xbc, after anything else \xc3: "üüü..."."""
    model = RWKV6(256, 1, 8, 8, n_ffn=8, lora_mix=1, lora_decay=1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.emb.weight[:, 0] = 1.0
        model.emb.weight[0xC3, 0] = -1.0
        model.blocks[0].ln0.weight.fill_(1.0)
        model.ln_out.weight.fill_(1.0)
        model.head.weight[0xC3, 0] = 1.0
        model.head.weight[0xBC, 0] = -1.0
    return model


def test_text_in_whole_characters() -> None:
    model, tokenizer = umlaut_model(), load_tokenizer("bytes")
    assert list(generate_text(model, tokenizer, "x", 7, temperature=0)) == ["ü", "ü", "ü", "\ufffd"]
    with pytest.raises(ValueError, match="prompt: expected some text"):
        generate_text(model, tokenizer, "")
    with pytest.raises(ValueError, match="stop: expected single tokens, but 'ab' is 2"):
        generate_text(model, tokenizer, "x", stop=["ab"])
    with pytest.raises(ValueError, match=f"256 tokens are more than the model's {V}"):
        generate_text(random_model("6"), tokenizer, "x")


# ---- the command line


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    save(umlaut_model(), tmp_path / "umlaut.pth")
    return str(tmp_path / "umlaut.pth")


def test_generate_command(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", checkpoint, "--prompt", "x", "--length", "7", "--temperature", "0"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "xüüü\ufffd\n"
    assert "tokens/s" in captured.err


def test_info_and_convert_commands(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "half.safetensors")
    assert main(["convert", checkpoint, out, "--dtype", "bfloat16"]) == 0
    assert "RWKV-6, 34 tensors" in capsys.readouterr().out
    assert main(["info", out]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    parameters = sum(p.numel() for p in umlaut_model().parameters())
    assert lines["version"] == "RWKV-6"
    assert lines["width"] == "8, 1 heads of 8"
    assert lines["parameters"] == f"{parameters:,}"
    assert lines["dtype"] == "bfloat16"
    assert lines["state"].startswith("0.00 MiB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "none.pth"], "no such file: none.pth"),
        (["generate", "CHECKPOINT", "--top-p", "0"], "top_p: expected"),
        (["generate", "CHECKPOINT", "--tokenizer", "other"], "tokenizer: expected"),
        (["generate", "CHECKPOINT", "--device", "nothing"], "device"),
        (["convert", "CHECKPOINT", "no/such/folder/x.pth"], "no/such/folder"),
        (["info", __file__], "is no checkpoint"),
    ],
    ids=str,
)
def test_errors_are_one_line(
    arguments: list[str], message: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([checkpoint if a == "CHECKPOINT" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("torch_rwkv6: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_module_runs(checkpoint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch_rwkv6", "info", checkpoint],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "RWKV-6" in done.stdout
