"""The article's scripts, each in a small form, and its numbers against those of others."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from one_line import assert_refused

pytest.importorskip("lightning", reason="the examples need torch_rwkv6[examples]")
pytest.importorskip("matplotlib", reason="the examples need torch_rwkv6[examples]")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES / "article"), str(EXAMPLES)]
import aft  # noqa: E402
import attention  # noqa: E402
import compare_mixers  # noqa: E402
import corpus  # noqa: E402
import mixers  # noqa: E402
import recall  # noqa: E402
import rnn  # noqa: E402
import rwkv4_numpy  # noqa: E402
import rwkv4_to_6  # noqa: E402

CHECKPOINT = Path(__file__).parent / "data" / "rwkv6-kjv.pth"


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the tables in a script's output, by the first of their row."""
    lines = (re.split(r" *\| *", line.strip("| ")) for line in output.splitlines() if "|" in line)
    return {first: cells for first, *cells in lines}


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one two three four five six seven eight nine ten\n" * 500)
    return path


@pytest.fixture
def rwkv4() -> dict[str, torch.Tensor]:
    """A random RWKV-4 in which every term counts: decays, bonuses, norms and mixes spread out."""
    model = mixers.build("rwkv4", 256, 3, 32, 16, 0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=1.0 if name == "emb.weight" else 32**-0.5)
        elif "time_" in name or "ln" in name:
            p.data += 0.3 * torch.randn_like(p)
    return {name: x.detach() for name, x in model.state_dict().items()}


@pytest.fixture
def rwkv4_file(rwkv4: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    torch.save(rwkv4, tmp_path / "rwkv4.pth")
    return tmp_path / "rwkv4.pth"


class TestRNN:
    @pytest.mark.parametrize("name", rnn.STEPS)
    def test_cells_are_those_of_torch(self, name: str) -> None:
        cell = rnn.STEPS[name][1](3, 5, batch_first=True)
        x = torch.randn(2, 30, 3)
        torch.testing.assert_close(rnn.unroll(name, x, cell)[0], cell(x)[0])

    def test_targets_are_the_last_marked_value(self) -> None:
        x, target = rnn.latch(3, 50)
        for b in range(3):
            for t in range(50):
                if x[b, t, 1]:
                    last = x[b, t, 0]
                assert target[b, t] == (last > 0)

    def test_script(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert rnn.main(["--iterations", "10", "--out", str(tmp_path)]) == 0
        table = rows(capsys.readouterr().out)
        for name in rnn.STEPS:
            _, _, off, *accuracies = table[name]
            assert float(off) < 1e-6
            assert all(0.4 < float(x) <= 1 for x in accuracies)
        assert table["LSTM"][:2] == ["1280", "32"]
        assert is_picture(tmp_path / "rnn.png")


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(["--longest", "128", "--out", str(tmp_path)]) == 0
    table = rows(capsys.readouterr().out)
    checks = [cells for name, cells in table.items() if "." in cells[0] and len(cells) == 1]
    assert len(checks) == 3
    assert all(float(off) < 1e-5 for (off,) in checks)
    # 4 heads of 64 float32: keys and values of every token, or one matrix a head
    assert [table[n][-2:] for n in ("64", "128")] == [["128", "64"], ["256", "64"]]
    assert is_picture(tmp_path / "attention.png")


class TestAFT:
    def test_script(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert aft.main(["--length", "12", "--out", str(tmp_path)]) == 0
        table = rows(capsys.readouterr().out)
        for name, ahead in (("AFT-full", "yes"), ("AFT-simple", "yes"), ("causal AFT", "no")):
            off, large, theirs, looks_ahead = table[name]
            assert float(off) < 1e-5
            assert float(large) < 1e-4  # float32 keys near 100 are 8e-6 apart
            assert theirs == "nan"
            assert looks_ahead == ahead
        assert float(table["RWKV-4, as an RNN"][0]) < 1e-5
        assert is_picture(tmp_path / "aft.png")

    def test_shorter_sequences_than_max_len(self) -> None:
        model = aft.AFTFull(20, 6, causal=True)
        x = torch.randn(2, 20, 6)
        torch.testing.assert_close(model(x[:, :9]), model(x)[:, :9])


class TestRWKV4Numpy:
    def test_logits_are_those_of_transformers(self, rwkv4, rwkv4_file: Path) -> None:
        transformers = pytest.importorskip("transformers")
        vocabulary, width = rwkv4["emb.weight"].shape
        config = transformers.RwkvConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            attention_hidden_size=width,
            intermediate_size=len(rwkv4["blocks.0.ffn.key.weight"]),
            num_hidden_layers=3,
            rescale_every=0,
        )
        model = transformers.RwkvForCausalLM(config).eval()
        names = {
            "emb.": "rwkv.embeddings.",
            "blocks.": "rwkv.blocks.",
            ".ln0.": ".pre_ln.",
            ".att.": ".attention.",
            ".ffn.": ".feed_forward.",
            "ln_out.": "rwkv.ln_out.",
            "time_mix_k": "time_mix_key",
            "time_mix_v": "time_mix_value",
            "time_mix_r": "time_mix_receptance",
        }
        theirs = {}
        for name, x in rwkv4.items():
            for ours, other in names.items():
                name = name.replace(ours, other)
            theirs[name] = x
        model.load_state_dict(theirs, strict=True)
        tokens = torch.randint(0, vocabulary, (1, 40))
        with torch.no_grad():
            expected = model(tokens).logits[0].numpy()

        weights = rwkv4_numpy.load(str(rwkv4_file))
        state, found = rwkv4_numpy.initial_state(weights), []
        assert state.shape == (3, 4, width)
        for token in tokens[0].tolist():
            logits, state = rwkv4_numpy.step(weights, token, state)
            found.append(logits)
        np.testing.assert_allclose(np.stack(found), expected, rtol=0, atol=1e-4)
        assert np.abs(expected).max() > 1

    def test_logits_of_a_trained_checkpoint(self) -> None:
        folder = os.environ.get("RWKV_TINY_CHECKPOINTS")
        if folder is None:
            pytest.skip("RWKV_TINY_CHECKPOINTS names no folder with rwkv4-660K.pth")
        weights = rwkv4_numpy.load(str(Path(folder) / "rwkv4-660K.pth"))
        expected = np.load(Path(folder) / "rwkv4-660K-expected-logits.npy")
        state = rwkv4_numpy.initial_state(weights)
        for token in b'"in':
            logits, state = rwkv4_numpy.step(weights, token, state)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("shift", [-1000.0, 1000.0])
    def test_an_average_of_any_weight(self, shift: float) -> None:
        random = np.random.default_rng(0)
        k, v = random.normal(size=(2, 20, 8)).astype(np.float32)
        average, log_den = np.zeros(8, np.float32), np.full(8, -np.inf, np.float32)
        for key, value in zip(k, v):
            average, log_den = rwkv4_numpy.include(average, log_den, value, key + np.float32(shift))
        p = np.exp(k.astype(np.float64))
        np.testing.assert_allclose(average, (p * v).sum(0) / p.sum(0), atol=1e-3)

    def test_script(self, rwkv4_file, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [str(rwkv4_file), "--length", "20", "--out", str(tmp_path), "--prompt", "für"]
        assert rwkv4_numpy.main(arguments) == 0
        first = capsys.readouterr().out
        assert first.startswith("für")
        assert rows(first)["3"][:3] == ["32", "256", "3 x 4 x 32 = 384"]
        assert is_picture(tmp_path / "rwkv4_numpy.png")
        assert rwkv4_numpy.main([*arguments, "--seed", "1"]) == 0
        assert capsys.readouterr().out.splitlines()[0] != first.splitlines()[0]

    def test_the_nucleus(self) -> None:
        random = np.random.default_rng(0)
        logits = np.log(np.array([0.1, 0.6, 0.05, 0.25], np.float32))
        drawn = [rwkv4_numpy.sample(logits, 1.0, 0.8, random) for _ in range(2000)]
        assert set(drawn) == {1, 3}
        assert np.mean(np.array(drawn) == 1) == pytest.approx(0.6 / 0.85, abs=0.05)
        assert {rwkv4_numpy.sample(logits, 1.0, 1e-9, random) for _ in range(20)} == {1}
        assert rwkv4_numpy.sample(logits, 0.0, 1.0, random) == 1

    def test_a_tokenizer_file(self, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=270)
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        model.train_from_iterator(["the three there thin"] * 3, trainer)
        path = str(tmp_path / "tokenizer.json")
        model.save(path)
        tokenizer = corpus.tokenizer_of(300, path)
        complete = tokenizer.stream()
        pieces = [complete.push(token) for token in tokenizer.encode("the thin 語")]
        assert "".join(pieces) == "the thin 語"
        assert "" in pieces  # bytes of a character that is not complete yet
        with pytest.raises(ValueError, match="at most 256 tokens"):
            corpus.tokenizer_of(256, path)


def test_4_to_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--checkpoint", str(CHECKPOINT), "--layer", "1"]):
        assert rwkv4_to_6.main([*arguments, "--text", "And God said", "--out", str(tmp_path)]) == 0
        output = capsys.readouterr().out
        table = rows(output)
        for stage in rwkv4_to_6.STAGES:
            *_, off = table[stage.name]
            assert float(off) < 1e-12
        assert all(float(table[stage.name][2]) > 0.01 for stage in rwkv4_to_6.STAGES[1:])
        assert float(output.split("TimeMix: ")[1].split()[0]) < 1e-12
        assert is_picture(tmp_path / "rwkv4_to_6.png")


class TestMixers:
    @pytest.mark.parametrize("name", mixers.NAMES)
    def test_pieces_equal_the_whole_and_nothing_looks_ahead(self, name: str) -> None:
        model = mixers.build(name, 32, 2, 32, 16, 24)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        tokens = torch.randint(0, 32, (2, 24))
        with torch.no_grad():
            whole, _ = model(tokens)
            state, pieces = None, []
            for piece in tokens.split([7, 1, 16], 1):
                logits, state = model(piece, state)
                pieces.append(logits)
        assert whole.std() > 0.1
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-3, atol=1e-4)

    def test_sizes_are_about_equal(self) -> None:
        sizes = {n: mixers.parameters(mixers.build(n, 64, 2, 64, 32, 64)) for n in mixers.NAMES}
        assert max(sizes.values()) < 1.01 * min(sizes.values())

    def test_rwkv4_equals_the_numpy_decoder(self, rwkv4, rwkv4_file: Path) -> None:
        model = mixers.build("rwkv4", 256, 3, 32, 16, 0)
        model.load_state_dict(rwkv4)
        tokens = torch.randint(0, 256, (1, 30))
        weights = rwkv4_numpy.load(str(rwkv4_file))
        state = rwkv4_numpy.initial_state(weights)
        with torch.no_grad():
            expected = model(tokens)[0][0].numpy()
        for token, row in zip(tokens[0].tolist(), expected, strict=True):
            logits, state = rwkv4_numpy.step(weights, token, state)
            np.testing.assert_allclose(logits, row, rtol=0, atol=1e-4)


def test_recall_asks_for_what_was_given() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, answers = recall.batch(50, 40, 4, 32, generator)
    for text, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        given = dict(zip(text[0:8:2], text[1:8:2], strict=True))
        assert len(given) == 4
        asked = {key: value for key, value in zip(text, answer) if value != recall.IGNORE}
        assert asked == given
        assert set(answer[:8]) == {recall.IGNORE}
        assert sum(key != 0 for key in text[8:]) == 4
    logits = torch.nn.functional.one_hot(answers.clamp(min=0), 32).float()
    assert recall.accuracy(logits, answers) == 1.0
    assert recall.accuracy(-logits, answers) < 0.2


def test_rwkv6_learns_to_recall_where_lstm_guesses() -> None:
    """How soon RWKV-6 finds out depends on every rounding of the CPU at hand; that it does, not."""

    def batches(size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield recall.batch(size, 16, 2, 16, generator)

    unseen, answers = next(batches(512, 1))
    models = {name: mixers.build(name, 16, 2, 32, 16, 16) for name in ("rwkv6", "lstm")}
    texts = {name: batches(32, 0) for name in models}
    accuracy = dict.fromkeys(models, 0.0)
    for _ in range(12):  # of which two to four are usual
        for name, model in models.items():
            compare_mixers.train(model, texts[name], 50, lr=5e-3)
            with torch.no_grad():
                accuracy[name] = recall.accuracy(model(unseen)[0], answers)
        if accuracy["rwkv6"] > 0.95:
            break
    assert accuracy["rwkv6"] > 0.95
    # one of the two values of a text, at random, is right half of the time
    assert 0.3 < accuracy["lstm"] < 0.75


def test_comparison(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(text), "--out", str(tmp_path), "--longest", "128"]
    arguments += ["--text-iterations", "12", "--recall-iterations", "2"]
    assert compare_mixers.main(arguments) == 0
    table = rows(capsys.readouterr().out)
    for name in mixers.NAMES:
        parameters, loss, accuracy, *costs = table[mixers.TITLES[name]]
        assert int(parameters.replace(",", "")) > 100_000
        assert float(loss) < 4.5  # ln 256 = 5.5
        assert 0 <= float(accuracy) < 0.5
        assert all(float(cost) > 0 for cost in costs)
        assert (tmp_path / f"{name}.pth").is_file()
    assert is_picture(tmp_path / "compare_losses.png")
    assert is_picture(tmp_path / "compare_costs.png")
    rwkv4_numpy.load(str(tmp_path / "rwkv4.pth"))


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (rnn.main, ["--iterations", "0"], "expected an integer of at least 1, got '0'"),
        (rwkv4_numpy.main, ["no-such.pth"], "no-such.pth"),
        (rwkv4_numpy.main, [__file__], "is no PyTorch checkpoint"),
        (rwkv4_numpy.main, [str(CHECKPOINT)], "is no RWKV-4"),
        (
            rwkv4_numpy.main,
            ["x.pth", "--top-p", "0"],
            "--top-p: expected a finite number > 0 and <= 1",
        ),
        (rnn.main, ["--seed", "-1"], "--seed: expected an integer of at least 0, got '-1'"),
        (rnn.main, ["--out", __file__], "--out: cannot be written"),
        (rwkv4_numpy.main, ["x.pth", "--temperature", "nan"], "--temperature: expected a finite"),
        (rwkv4_to_6.main, ["--checkpoint", "no-such.pth"], "no such file: no-such.pth"),
        (rwkv4_to_6.main, ["--text", ""], "--text: expected some text"),
        (compare_mixers.main, ["--lr", "inf"], "--lr: expected a finite number > 0, got 'inf'"),
        (attention.main, ["--longest", "x"], "--longest: expected an integer of at least 1"),
        (aft.main, ["--length", "0"], "--length: expected an integer of at least 1, got '0'"),
        (rwkv4_to_6.main, ["--layer", "2"], "--layer: expected 0 to 1, got 2"),
        (compare_mixers.main, ["--mixers", "lstm,mamba"], "'mamba' is none of lstm, gru"),
        (compare_mixers.main, ["--data", "no-such.txt"], "no-such.txt"),
    ],
    ids=lambda x: " ".join(x).replace(__file__, "THIS") if isinstance(x, list) else "",
)
def test_errors_are_one_line_and_exit_code_2(
    main,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(main, f"{main.__module__}.py", arguments, message, capsys)
