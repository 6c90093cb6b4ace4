"""Long documents, as a user runs them; and what the examples share."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from one_line import assert_refused

pytest.importorskip("lightning", reason="the examples need torch_rwkv6[examples]")

EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = Path(__file__).parent / "data" / "rwkv6-kjv.pth"
sys.path.insert(0, str(EXAMPLES))  # as running a script does
import corpus  # noqa: E402
import generate  # noqa: E402
import infctx  # noqa: E402
import memory  # noqa: E402
import text_data  # noqa: E402
import text_model  # noqa: E402
import train  # noqa: E402

from torch_rwkv6 import models  # noqa: E402
from torch_rwkv6.models import load, save  # noqa: E402
from torch_rwkv6.nn import RWKV6  # noqa: E402


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"and the number is seven, but the number was eight. " * 200)
    return path


def checkpoint() -> dict[str, torch.Tensor]:
    weights = torch.load(CHECKPOINT, weights_only=True)
    return {name: x.float() for name, x in weights.items()}


class TestInfctx:
    def gradient(self, window: int, chunk: int = 16) -> tuple[torch.Tensor, float]:
        model = load(checkpoint())
        tokens = torch.randint(97, 123, (2, 65))
        loss, _ = infctx.backward_in_chunks(
            model, tokens[:, :-1], tokens[:, 1:], None, chunk, window
        )
        found = infctx.gradient(model)
        model.zero_grad()
        expected, _ = text_model.loss_of(model, tokens[:, :-1], tokens[:, 1:])
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        exact = infctx.gradient(model)
        return found, ((found - exact).norm() / exact.norm()).item()

    def test_a_window_of_all_chunks_gives_the_gradient_of_the_whole(self) -> None:
        assert self.gradient(window=4)[1] < 1e-5
        assert self.gradient(window=9, chunk=24)[1] < 1e-5  # the last chunk is shorter

    def test_a_shorter_window_does_not(self) -> None:
        assert self.gradient(window=1)[1] > 1e-3

    def test_script(self, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sizes = ["--document", "256", "--chunk", "32", "--batch-size", "2", "--steps", "12"]
        assert infctx.main(["--data", str(text), *sizes]) == 0
        output = capsys.readouterr().out
        first, last = map(float, re.findall(r"([\d.]+) at the", output))
        assert last < first - 1
        figures = re.findall(r"([\d.]+) MiB, gradient off by ([\d.e+-]+)", output)
        (whole, _), (one, cut), (chunks, exact) = [tuple(map(float, x)) for x in figures]
        assert chunks < 0.4 * whole
        assert one < 0.4 * whole
        assert exact < 1e-4 < cut


def test_crops_are_pieces_of_the_text_and_its_next_tokens() -> None:
    text = bytes(range(100))
    batches = iter(text_data.Crops(text, 5, 7, seed=3))
    for tokens, targets in (next(batches), next(batches)):
        assert tokens.shape == targets.shape == (5, 7)
        assert torch.equal(tokens + 1, targets)
    again, _ = next(iter(text_data.Crops(text, 5, 7, seed=3)))
    assert not torch.equal(again, tokens)


def test_peak_memory_is_that_of_what_lives_at_one_time() -> None:
    x = torch.zeros(1000, 1000)

    def three_at_a_time() -> None:
        a = x + 1
        b = a + 1
        del a
        c = b + 1
        assert (c + 1).sum() > 0

    assert memory.peak_memory(three_at_a_time) == pytest.approx(12e6, rel=0.01)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (infctx.main, ["--lr", "-1"], "--lr: expected a finite number > 0, got '-1'"),
        (infctx.main, ["--data", "five"], "the text has 5 bytes: too few for 4 lanes"),
        (
            infctx.main,
            ["--seed", "4294967296"],
            "--seed: expected an integer of at most 4294967295",
        ),
        (infctx.main, ["--chunk", "-1"], "expected an integer of at least 1, got '-1'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
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
    Path("five").write_bytes(b"hello")
    assert_refused(main, f"{main.__module__}.py", arguments, message, capsys)


def test_the_vocabulary_chooses_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_tokenizer(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, vocab_size=256)

    monkeypatch.setattr(models, "load_tokenizer", load_tokenizer)
    for size, name in ((256, "bytes"), (65529, "world"), (65530, "world"), (65536, "world")):
        assert corpus.tokenizer_of(size).name == name
    for size in (255, 300, 50277, 65528, 65537):
        with pytest.raises(ValueError, match="--tokenizer: needed for a vocabulary of"):
            corpus.tokenizer_of(size)
    assert corpus.tokenizer_of(300, "bytes").name == "bytes"
    for size, name in ((255, "bytes"), (50277, "world")):
        with pytest.raises(ValueError, match=f"--tokenizer: expected one of at most {size} tokens"):
            corpus.tokenizer_of(size, name)


@pytest.mark.parametrize("main", [train.main, generate.main], ids=lambda x: x.__module__)
def test_a_vocabulary_that_decides_nothing_is_refused(
    main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(RWKV6(300, 1, 16, 16, lora_mix=4, lora_decay=4), "model.pth")
    Path("text.txt").write_text("some text " * 50)
    generating = main is generate.main
    assert main(["model.pth"] if generating else ["--model=model.pth", "--data=text.txt"]) == 2
    assert "--tokenizer: needed for a vocabulary of 300 tokens" in capsys.readouterr().err
