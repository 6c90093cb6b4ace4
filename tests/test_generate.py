"""Generation, sampling, tokenizers and the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import D, L, N, V, random_model, random_tokens
from one_line import assert_refused
from torch import Tensor

from torch_rwkv6 import generate
from torch_rwkv6.__main__ import main
from torch_rwkv6.models import TextDecoder, generate_text, load_tokenizer, save
from torch_rwkv6.models.sampling import Counts, Penalties, Sampling, draw, probabilities
from torch_rwkv6.models.tokenizers import Tokenizer
from torch_rwkv6.nn import RWKV, RWKV6, RWKVState

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
    counts = Counts(Penalties(presence, frequency, decay, free))
    logits, occurrence = torch.randn(50), {}
    for token in (1, 2, 1, 4, 2, 1, 0, *range(20, 45), 4):
        counts.add(token)
        occurrence = {t: n * decay for t, n in occurrence.items()}
        occurrence[token] = occurrence.get(token, 0.0) + (token not in free)
        expected, found = logits.clone(), logits.clone()
        for t, n in occurrence.items():
            expected[t] -= presence + n * frequency
        tokens, loss = counts.penalties()
        found[torch.from_numpy(tokens)] -= torch.from_numpy(loss).float()
        torch.testing.assert_close(found, expected)


def test_settings_that_do_not_fit() -> None:
    for options, name in (
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"alpha_decay": 2.0}, "alpha_decay"),
        ({"alpha_presence": float("inf")}, "alpha_presence"),
        ({"alpha_frequency": float("nan")}, "alpha_frequency"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            generate(random_model("6"), [1], **options)  # type: ignore[arg-type]
    for name in ("max_tokens", "top_k", "seed"):
        for value in (2.5, 2.0, True, "2", None if name != "seed" else "x", np.float32(2)):
            with pytest.raises(TypeError, match=f"{name}: expected an integer, got "):
                generate(random_model("6"), [1], **{name: value})  # type: ignore[arg-type]
    for name in ("temperature", "top_p", "alpha_presence", "alpha_frequency", "alpha_decay"):
        for wrong in ("0.5", None, True, torch.tensor(0.5)):
            with pytest.raises(TypeError, match=f"{name}: expected a number, got "):
                generate(random_model("6"), [1], **{name: wrong})  # type: ignore[arg-type]
    for name in ("stop_tokens", "free_tokens"):
        for wrong, error in (
            ("0", TypeError),
            (0, TypeError),
            ([0.0], TypeError),
            (torch.tensor(0), TypeError),
            ([V], IndexError),
        ):
            with pytest.raises(error, match=f"{name}: expected "):
                generate(random_model("6"), [1], **{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compiled: expected"):
        generate(random_model("6"), [1], compiled=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected an RWKV, got Linear"):
        generate(torch.nn.Linear(2, 2), [1])  # type: ignore[arg-type]


def test_settings_from_numpy() -> None:
    model = random_model("6")
    options = {"top_k": np.int64(3), "temperature": np.float32(0.5), "stop_tokens": np.arange(2)}
    found = tokens_of(model, [1], np.int32(4), seed=np.uint8(3), **options)
    expected = tokens_of(model, [1], 4, seed=3, top_k=3, temperature=0.5, stop_tokens=[0, 1])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("vocab", [1000, 3])
def test_equally_likely_tokens_all_stay(vocab: int) -> None:
    p, token = probabilities(torch.zeros(1, vocab), Sampling(top_p=0.01))
    torch.testing.assert_close(p, torch.full((1, vocab), 1 / vocab))
    assert token.tolist() == [list(range(vocab))]
    # one likelier token that falls short of top_p, and others as likely as each other
    logits = torch.full((1, vocab), -2.0)
    logits[0, 2] = 0.0
    p, token = probabilities(logits, Sampling(top_p=torch.softmax(logits, 1)[0, 2].item() + 1e-3))
    assert (p > 0).sum() == vocab
    assert token[0, 0] == 2
    p, _ = probabilities(torch.zeros(1, vocab), Sampling(top_p=0.01, top_k=2))
    assert p.tolist() == [[0.5, 0.5]]


def test_top_p_of_1_keeps_every_token() -> None:
    logits = torch.randn(2, 60_000) * 3
    p, _ = probabilities(logits, Sampling(top_p=1.0))
    assert bool((p > 0).all())


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    """Equally likely tokens within the first 512, beside a row that needs more than those."""
    logits = torch.full((2, 2000), -20.0)
    logits[0, torch.randperm(2000)[:300]] = 0.0
    logits[1] = torch.randn(2000)
    generators = [[torch.Generator().manual_seed(i) for i in (seed, seed)] for seed in range(20)]
    both = [draw(*probabilities(logits, Sampling()), g)[0].item() for g in generators]
    generators = [[torch.Generator().manual_seed(seed)] for seed in range(20)]
    assert [draw(*probabilities(logits[:1], Sampling()), g).item() for g in generators] == both


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e30])
def test_infinite_logits(temperature: float, dtype: torch.dtype) -> None:
    sampling = Sampling(temperature, top_p=1.0)
    inf = torch.inf
    for row in ([inf, 0.0, 1.0], [torch.nan, 0.0, 1.0], [-inf, -inf, -inf], [inf, -inf, torch.nan]):
        logits = torch.tensor([[0.0, 1.0, 2.0], row], dtype=dtype)
        with pytest.raises(FloatingPointError, match=r"logits: expected finite.*got .*bfloat16"):
            probabilities(logits, sampling)
    p, token = probabilities(torch.tensor([[-inf, 1.0, -inf]], dtype=dtype), sampling)
    assert token[0, 0] == 1
    assert p[0].tolist() == [1.0, 0.0, 0.0][: p.shape[1]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_draws_do_not_follow_the_default_dtype_and_device(dtype: torch.dtype, device: str) -> None:
    model, prompts = random_model("6"), [[3, 1], [4]]
    options = {"seed": 3, "top_p": 1.0, "alpha_presence": 0.2, "free_tokens": [1]}
    expected = tokens_of(model, prompts, 20, **options)
    torch.manual_seed(5)
    unseeded = tokens_of(model, prompts, 5)
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        stream = list(generate(model, prompts, 20, **options))
        torch.manual_seed(5)
        other = list(generate(model, prompts, 5))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(torch.stack(stream, 1), expected)
    assert torch.equal(torch.stack(other, 1), unseeded)


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


def test_prompts_of_every_kind() -> None:
    model = random_model("6")
    expected = tokens_of(model, [[3, 1, 4]], 5, seed=0)
    for prompt in (
        [3, 1, 4],
        (3, 1, 4),
        bytes([3, 1, 4]),
        [np.int64(3), np.uint8(1), np.int32(4)],
        np.array([3, 1, 4]),
        np.array([[3, 1, 4]], dtype=np.uint16),
        [np.array([3, 1, 4])],
        torch.tensor([3, 1, 4]),
        torch.tensor([[3, 1, 4]], dtype=torch.uint16),
        [torch.tensor([3, 1, 4])],
        [torch.tensor(3), torch.tensor(1), torch.tensor(4)],
    ):
        assert torch.equal(tokens_of(model, prompt, 5, seed=0), expected), prompt


def test_prompts_that_do_not_fit() -> None:
    model = random_model("6")
    for prompt, error, message in (
        ("text", TypeError, "generate_text takes text"),
        (3, TypeError, "prompt: expected token ids, got int"),
        (None, TypeError, "prompt: expected token ids, got NoneType"),
        ({1, 2}, TypeError, "prompt: expected token ids, got set"),
        ([], ValueError, "at least one sequence"),
        ([[1], []], ValueError, "at least one token"),
        ([[]], ValueError, "at least one token"),
        (np.zeros((2, 0), int), ValueError, "at least one token"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "at least one token"),
        (torch.zeros(3), ValueError, r"token ids \[B, T\]"),
        (torch.ones(1, 3, dtype=torch.bool), ValueError, r"token ids \[B, T\]"),
        (torch.ones(1, 1, 1, dtype=torch.int64), ValueError, r"token ids \[B, T\]"),
        ([1.0], TypeError, r"prompt: expected integer token ids, got 1.0 \(float\)"),
        ([[1.5]], TypeError, r"prompt: expected integer token ids, got 1.5 \(float\)"),
        ([[1], [2.0]], TypeError, r"prompt: expected integer token ids, got 2.0 \(float\)"),
        ([np.float32(1)], TypeError, "prompt: expected integer token ids"),
        (np.array([1.0]), TypeError, "prompt: expected integer token ids"),
        ([True], TypeError, r"prompt: expected integer token ids, got True \(bool\)"),
        ([np.True_], TypeError, "prompt: expected integer token ids"),
        ([torch.tensor(True)], TypeError, "prompt: expected integer token ids"),
        ([None], TypeError, r"prompt: expected integer token ids, got None"),
        (["a"], TypeError, r"prompt: expected integer token ids, got 'a' \(str\)"),
        ([[[1]]], TypeError, r"prompt: expected integer token ids, got \[1\] \(list\)"),
        ([1, [2]], TypeError, "prompt: expected token ids or lists of them, got both"),
        ([V], IndexError, f"from 0 to {V - 1}, got {V}"),
        ([np.int64(V)], IndexError, f"from 0 to {V - 1}, got {V}"),
        ([2**70], IndexError, f"from 0 to {V - 1}"),
        (torch.tensor([[1, V]]), IndexError, f"from 0 to {V - 1}, got {V}"),
        ([-1], IndexError, "got -1"),
    ):
        with pytest.raises(error, match=message):
            generate(model, prompt)  # type: ignore[arg-type]


def test_states_that_do_not_fit() -> None:
    model = random_model("6")
    state = model.initial_state(2)
    other = RWKV6(V, L + 1, D, N)
    narrow = RWKV6(V, L, 16, N)
    heads = RWKV6(V, L, D, 16)
    for wrong, error, message in (
        (model.initial_state(1), ValueError, "state: expected 2 rows, one per prompt, got 1"),
        (tuple(state), TypeError, "state: expected an RWKVState, got tuple"),
        (
            other.initial_state(2),
            ValueError,
            r"state.att_shift: expected .*\(3, 2, 32\), got \(4, 2, 32\)",
        ),
        (narrow.initial_state(2), ValueError, r"state.att_shift: expected .*\(3, 2, 32\), "),
        (heads.initial_state(2), ValueError, r"state.wkv: expected .*\(3, 2, 4, 8, 8\), "),
        (
            random_model("4").initial_state(2),
            ValueError,
            r"state.wkv: expected .*\(3, 2, 4, 8, 8\), ",
        ),
        (state.to(dtype=torch.bfloat16), TypeError, "state.att_shift: expected torch.float32, got"),
        (state._replace(wkv=state.wkv.double()), TypeError, "state.wkv: expected torch.float32"),
        (state._replace(ffn_shift=None), TypeError, "state.ffn_shift: expected a torch.Tensor"),
        (state.to("meta"), ValueError, "state.att_shift: expected device cpu, got meta"),
        (
            RWKVState(*(x.expand(L, 2, *x.shape[2:]) for x in model.initial_state(1))),
            ValueError,
            "state.att_shift: expected memory of its own",
        ),
    ):
        with pytest.raises(error, match=message):
            generate(model, [[1], [2]], state=wrong)  # type: ignore[arg-type]


def test_a_model_that_overflows() -> None:
    for value in (torch.nan, torch.inf):
        model = random_model("6")
        with torch.no_grad():
            model.head.weight.fill_(value)
        for temperature in (0, 1):
            with pytest.raises(FloatingPointError, match="logits: expected finite"):
                tokens_of(model, [1], 2, temperature=temperature)


# ---- the state that a generation leaves


def assert_seen(model: RWKV, state: RWKVState, texts: Sequence[Sequence[int]]) -> None:
    """Each row of the state is that of `forward` over one of the texts."""
    for b, text in enumerate(texts):
        with torch.no_grad():
            _, expected = model(torch.tensor([list(text)]))
        for found, x in zip(state.select([b]), expected, strict=True):
            torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("prompts", [[[3, 1], [4, 1], [5, 9]], [[3, 1, 4], [1], [5, 9]]], ids=str)
def test_the_state_has_seen_the_prompt_and_the_tokens_yielded(
    prompts: list[list[int]], version: str
) -> None:
    model, options = random_model(version), {"seed": 1, "top_p": 1.0}
    free = tokens_of(model, prompts, 12, **options)
    stops = {int(free[0, 3]), int(free[2, 6])}  # rows end at different times
    for stop_tokens, max_tokens in ((stops, 12), (range(V), 3), ((), 12), ((), 1), ((), 0)):
        state = model.initial_state(3)
        texts = [list(prompt) for prompt in prompts]
        for token in generate(
            model, prompts, max_tokens, stop_tokens=stop_tokens, state=state, **options
        ):
            for text, t in zip(texts, token.tolist(), strict=True):
                if t >= 0:
                    text.append(t)
            assert_seen(model, state, texts)  # while it is under way, too
        assert_seen(model, state, texts)


def test_a_row_that_has_ended_leaves_the_batch() -> None:
    model, prompts = random_model("6"), [[3, 1], [4, 1], [5, 9]]
    free = tokens_of(model, prompts, 12, seed=1, top_p=1.0)
    stops = {int(free[0, 3])}
    fed: list[int] = []
    model.emb.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[0]))
    found = tokens_of(model, prompts, 12, seed=1, top_p=1.0, stop_tokens=stops)
    # one call for the prompts; the last token is fed to nobody, as no state was given
    going = [(column >= 0).sum().item() for column in found.T]
    assert fed == [3, *going[: len(fed) - 1]]
    assert len(fed) in (found.shape[1], found.shape[1] + 1)
    assert min(going) < 3


def test_a_state_of_an_ended_row_equals_that_of_the_prompt_alone() -> None:
    model = random_model("5.2")
    prompts = [[3, 1], [4, 1]]
    first = int(tokens_of(model, prompts, 1, seed=0)[0, 0])
    state, alone = model.initial_state(2), model.initial_state(1)
    tokens_of(model, prompts, 20, seed=0, stop_tokens=[first], state=state)
    list(generate(model, prompts[:1], 20, seed=0, stop_tokens=[first], state=alone))
    assert_seen(model, alone, prompts[:1])
    assert_seen(model, state, prompts[:1])


def test_a_state_goes_on_with_new_text() -> None:
    model = random_model("6")
    state = model.initial_state(1)
    first = tokens_of(model, [1, 2, 3], 5, temperature=0, state=state)[0].tolist()
    rest = tokens_of(model, [7, 8], 6, temperature=0, state=state)
    assert torch.equal(rest, tokens_of(model, [1, 2, 3, *first, 7, 8], 6, temperature=0))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_states_made_in_every_mode(mode: Callable[[], Any], version: str) -> None:
    model = random_model(version)
    expected = tokens_of(model, [1, 2, 3], 4, seed=0)
    with mode():
        _, state = model(torch.tensor([[1, 2]]))
    tokens = list(generate(model, [3], 4, seed=0, state=state))
    assert torch.equal(torch.stack(tokens, 1), expected)
    assert_seen(model, state, [[1, 2, 3, *expected[0].tolist()]])


def test_a_caller_who_asks_for_no_more_and_goes_on_later() -> None:
    model, state = random_model("6"), random_model("6").initial_state(1)
    whole = tokens_of(model, [1, 2], 10, seed=4)[0].tolist()
    stream = generate(model, [1, 2], 10, seed=4, state=state)
    assert not any(x.any() for x in state)  # the prompt is read with the first token
    found = [next(stream).item() for _ in range(3)]
    assert_seen(model, state, [[1, 2, *found]])
    found += [token.item() for token in stream]
    assert found == whole
    stream = generate(model, [1, 2], 10, seed=4, state=state)
    next(stream)
    before = state.clone()
    stream.close()
    for x, y in zip(state, before, strict=True):
        assert torch.equal(x, y)


def test_draws_of_a_row_do_not_depend_on_rows_that_ended() -> None:
    model, prompts = random_model("6"), [[3, 1], [4, 1], [5]]
    free = tokens_of(model, prompts, 15, seed=2, top_p=1.0, alpha_presence=0.3)
    stop = int(free[1, 2])
    found = tokens_of(model, prompts, 15, seed=2, top_p=1.0, alpha_presence=0.3, stop_tokens=[stop])
    for row, expected in zip(found.tolist(), free.tolist(), strict=True):
        end = expected.index(stop) if stop in expected else 15
        assert row == expected[:end][: len(row)] + [-1] * (len(row) - end)


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
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("half a character \ud83d")


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
        ("bytes:latin-99", ValueError, r"goes on where it ended, .* got latin-99"),
        ("bytes:rot13", ValueError, "got rot13"),
        ("bytes:base64", ValueError, "got base64"),
        ("bytes:undefined", ValueError, "got undefined"),
        ("bytes:utf-16", ValueError, "utf-16-le, got utf-16"),
        (None, TypeError, "tokenizer: expected a name, got NoneType"),
        ("none.json", FileNotFoundError, "no such file: none.json"),
    ):
        if name == "none.json":
            pytest.importorskip("tokenizers")
        with pytest.raises(error, match=message):
            load_tokenizer(name)  # type: ignore[arg-type]
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
    with pytest.raises(ValueError, match=f"256 tokens are more than the model's {V}"):
        generate_text(random_model("6"), tokenizer, "x")


STOPS = ["User", "ü", "üx", "\n\nUser:", "s", "ab", "aab"]


@pytest.mark.parametrize("name", ["bytes", "bytes:utf-16-le", "world"])
def test_text_ends_before_a_stop(name: str) -> None:
    """Stops lie across tokens, and their beginnings occur without the rest."""
    if name == "world":
        pytest.importorskip("rwkv")
    tokenizer = load_tokenizer(name)
    text = "Users aaab \n\nUse it, üü \n\nUser: no"
    for stops in ([], *([stop] for stop in STOPS), STOPS[3:], ["nowhere"]):
        # the stop that is complete first ends the text
        ends = sorted((text.index(s) + len(s), text.index(s)) for s in stops if s in text)
        expected = text[: ends[0][1]] if ends else text
        decoder, shown = TextDecoder(tokenizer, stops), ""
        for token in tokenizer.encode(text):
            shown += decoder.push(token)
            assert expected.startswith(shown)
        assert shown + decoder.flush() == expected
        assert decoder.stopped == bool(ends)


def test_a_stop_is_a_text_and_stop_tokens_are_merged() -> None:
    model, tokenizer = umlaut_model(), load_tokenizer("bytes")

    def written(**options: object) -> str:
        return "".join(generate_text(model, tokenizer, "x", 8, temperature=0, **options))

    assert written() == "üüüü"
    assert written(stop="User") == written(stop=["U", "x"]) == "üüüü"
    assert written(stop="ü") == ""
    assert written(stop="üüü") == ""
    assert written(stop="üüx") == "üüüü"
    assert written(stop_tokens=[0]) == "üüüü"
    assert written(stop_tokens=[0xBC]) == "\ufffd"
    assert written(stop=["User"], stop_tokens=[0xC3]) == ""
    state = model.initial_state(1)
    assert written(stop="ü", state=state) == ""
    assert_seen(model, state, [b"x\xc3\xbc"])
    for stop, error in (
        ("", ValueError),
        (["a", ""], ValueError),
        ([1], TypeError),
        (1, TypeError),
    ):
        with pytest.raises(error, match="stop: expected"):
            written(stop=stop)
    with pytest.raises(TypeError, match="prompt: expected text, got list"):
        generate_text(model, tokenizer, [1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer: expected one of load_tokenizer, got str"):
        generate_text(model, "bytes", "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_tokens: expected an integer"):
        generate_text(model, tokenizer, "x", 2.5)  # type: ignore[arg-type]


def test_a_text_says_why_it_ended() -> None:
    model, tokenizer = umlaut_model(), load_tokenizer("bytes")
    for options, written, reason in (
        ({}, "üü", "length"),
        ({"stop": "x"}, "üü", "length"),
        ({"stop": "üü"}, "", "stop"),
        ({"stop_tokens": [0xC3]}, "", "stop"),
        ({"end_tokens": [0xC3]}, "", "end of text"),
        ({"end_tokens": [0xC3], "stop_tokens": [0xC3]}, "", "stop"),
    ):
        text = generate_text(model, tokenizer, "x", 4, temperature=0, logprobs=0, **options)
        assert text.finish_reason is None
        assert "".join(text) == written
        assert text.finish_reason == reason
        assert len(text.request.logprobs) == len(text.request.tokens)
    text = generate_text(model, tokenizer, "x", 4)
    next(text)
    text.close()
    assert list(text) == []
    assert text.finish_reason is None


def test_rows_say_why_they_ended() -> None:
    tokens = generate(umlaut_model(), [b"x", b"\xc3"], 3, temperature=0, stop_tokens=[0xBC])
    assert tokens.finish_reasons == [None, None]
    assert torch.stack(list(tokens), 1).tolist() == [[0xC3], [-1]]
    assert tokens.finish_reasons == ["stop", "stop"]
    tokens = generate(umlaut_model(), b"x", 3, logprobs=2)
    assert len(list(tokens)) == 3
    assert tokens.finish_reasons == ["length"]
    assert [len(top) for top in tokens.requests[0].top_logprobs] == [2, 2, 2]


def test_a_text_ends_at_the_tokenizers_end_of_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    names = ["<|endoftext|>", "<pad>", "<mine>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=names
    )
    built.train_from_iterator(["hello"], trainer)
    file = tmp_path / "tokenizer.json"
    built.save(str(file))
    config = tmp_path / "tokenizer_config.json"
    for content, end in (
        (None, 0),
        ('{"eos_token": "<mine>"}', 2),
        ('{"eos_token": {"content": "<mine>"}}', 2),
        ('{"eos_token": null}', 0),
        ("no JSON", 0),
        ("[]", 0),
    ):
        if content is not None:
            config.write_text(content)
        tokenizer = load_tokenizer(str(file))
        assert tokenizer.end_tokens == {end}
    tokenizer = load_tokenizer(str(file))
    options = {"logit_bias": {0: 1000.0}}
    model = RWKV6(tokenizer.vocab_size, 1, 8, 8, n_ffn=8, lora_mix=1, lora_decay=1)
    for end_tokens, reason in ((None, "end of text"), ((), "length")):
        text = generate_text(model, tokenizer, "hello", 5, end_tokens=end_tokens, **options)
        assert list(text) == []
        assert text.finish_reason == reason
        assert text.request.tokens == ([] if reason == "end of text" else [0] * 5)
    with pytest.raises(IndexError, match="end_tokens: expected tokens from 0"):
        generate_text(model, tokenizer, "hello", end_tokens=[10**6])


def test_the_end_of_text_of_world_is_token_0() -> None:
    pytest.importorskip("rwkv")
    world = load_tokenizer("world")
    assert world.end_tokens == {0}
    assert world.decode([0]) == ""


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
        (["generate", "CHECKPOINT", "--top-p", "nan"], "top_p: expected"),
        (["generate", "CHECKPOINT", "--temperature", "-1"], "temperature: expected"),
        (["generate", "CHECKPOINT", "--temperature", "inf"], "temperature: expected"),
        (["generate", "CHECKPOINT", "--top-k", "-1"], "top_k: expected"),
        (["generate", "CHECKPOINT", "--length", "-1"], "max_tokens: expected"),
        (["generate", "CHECKPOINT", "--seed", "-1"], "seed: expected"),
        (["generate", "CHECKPOINT", "--seed", "9" * 30], "seed: expected"),
        (["generate", "CHECKPOINT", "--presence", "nan"], "alpha_presence: expected"),
        (["generate", "CHECKPOINT", "--ln-x-eps", "-1"], "ln_x_eps: expected"),
        (["generate", "CHECKPOINT", "--prompt", ""], "prompt: expected"),
        (["generate", "CHECKPOINT", "--stop", ""], "stop: expected"),
        (
            ["generate", "CHECKPOINT", "--tokenizer", "bytes:ascii", "--prompt", "é"],
            "prompt: expected",
        ),
        (["generate", "CHECKPOINT", "--tokenizer", "bytes:rot13"], "tokenizer: expected"),
        (["generate", "CHECKPOINT", "--device", "nothing"], "device: expected"),
        (["generate", "CHECKPOINT", "--device", "cuda:99"], "device: expected"),
        (["info", ""], "source: expected"),
        (["info", "RWKV/v6-Finch-1B6-HF"], "Hugging Face hub"),
        (["info", "https://example.com/model.pth"], "the URL"),
        (["convert", "none.pth", "no/such/folder/x.pth"], "no/such/folder"),  # before it reads
        (["convert", "CHECKPOINT", "."], "a folder, where a file is to be written"),
        (["convert", "CHECKPOINT", "no/such/folder/x.pth"], "no/such/folder"),
        (["info", __file__], "is no checkpoint"),
    ],
    ids=str,
)
def test_errors_are_one_line(
    arguments: list[str], message: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [checkpoint if a == "CHECKPOINT" else a for a in arguments]
    assert assert_refused(main, "torch_rwkv6", given, message, capsys) == ""


def test_a_model_whose_logits_are_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = umlaut_model()
    with torch.no_grad():
        model.head.weight.fill_(torch.nan)
    save(model, tmp_path / "nan.pth")
    assert main(["generate", str(tmp_path / "nan.pth")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("torch_rwkv6: error: logits: expected finite numbers, got NaN")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_text_that_the_encoding_does_not_have(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokenizer", "bytes:ascii", "--temperature", "0", "--length", "4"]
    assert main(["generate", checkpoint, "--prompt", "x", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == "x\ufffd\ufffd\ufffd\ufffd\n"
    assert captured.err.startswith("4 tokens in ")


def command(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", "torch_rwkv6", *arguments],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
        **{"stdout": subprocess.PIPE} | options,
    )


def test_the_module_runs(checkpoint: str) -> None:
    process = command("info", checkpoint)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert b"RWKV-6" in out


@pytest.mark.parametrize(("end", "code"), [("interrupt", 130), ("close the pipe", 141)])
def test_text_that_somebody_ends(end: str, code: int, checkpoint: str) -> None:
    """As Ctrl-C and ``| head`` do."""
    process = command("generate", checkpoint, "--length", "100000000")
    assert process.stdout is not None
    process.stdout.read(20)
    if end == "interrupt":
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    else:
        process.stdout.close()
        assert process.stderr is not None
        error = process.stderr.read()
        process.wait()
    assert process.returncode == code
    assert error == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk, as Linux offers it")
def test_output_that_cannot_be_written(checkpoint: str) -> None:
    with open("/dev/full", "wb") as full:
        process = command("info", checkpoint, stdout=full)
        _, error = process.communicate()
    assert process.returncode == 2
    assert error.startswith(b"torch_rwkv6: error: ")
    assert error.count(b"\n") == 1
