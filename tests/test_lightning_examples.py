"""State tuning, LoRA, long documents and DDP, as a user runs them, in a small form."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from one_line import assert_refused

pytest.importorskip("lightning", reason="the examples need torch_rwkv6[examples]")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # as running a script does
import corpus  # noqa: E402
import ddp  # noqa: E402
import generate  # noqa: E402
import infctx  # noqa: E402
import lora  # noqa: E402
import state_tuning  # noqa: E402
import text_data  # noqa: E402
import text_model  # noqa: E402

from torch_rwkv6 import models  # noqa: E402
from torch_rwkv6.models import load, save  # noqa: E402
from torch_rwkv6.models.tokenizers import WorldTokenizer  # noqa: E402
from torch_rwkv6.nn import RWKV6  # noqa: E402


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"and the number is seven, but the number was eight. " * 200)
    return path


def numbers(output: str, *labels: str) -> list[float]:
    """The number behind each label."""
    found = [re.search(re.escape(label) + r"[^:]*: ([\d.]+)", output) for label in labels]
    return [float(match[1]) for match in found]


def checkpoint() -> dict[str, torch.Tensor]:
    weights = torch.load(text_model.CHECKPOINT, weights_only=True)
    return {name: x.float() for name, x in weights.items()}


def test_state_tuning_trains_states_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a folder/that is made/state.pth"
    assert state_tuning.main(["--data", str(text), "--steps", "25", "--out", str(out)]) == 0
    before, prompted, after = numbers(
        capsys.readouterr().out, "from zero states", "after a prompt", "from trained states"
    )
    assert after < min(before, prompted) - 0.1
    states = torch.load(out, weights_only=True)
    assert {n: tuple(x.shape) for n, x in states.items()} == {
        f"blocks.{i}.att.time_state": (2, 32, 32) for i in range(2)
    }
    # the file says all: checkpoint and states together give the figure again
    model = load(checkpoint() | states)
    test_text = text.read_bytes()[-len(text.read_bytes()) // 10 :]
    assert text_model.bits_per_token(model, test_text, 16) == pytest.approx(after, abs=0.01)


def test_lora_trains_and_merges(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="the example needs torch_rwkv6[examples]")
    out = tmp_path / "a folder/that is made/merged.pth"
    arguments = ["--data", str(text), "--steps", "25", "--rank", "4", "--out", str(out)]
    assert lora.main(arguments) == 0
    output = capsys.readouterr().out
    before, after, merged = numbers(output, "checkpoint", "with LoRA", "merged")
    assert after < before - 0.5
    assert merged == pytest.approx(after, abs=2e-3)
    # two layers of 64 and 224 channels: 6 matrices 64 x 64, 224 x 64 and 64 x 224, rank 4
    assert f"({2 * 4 * (6 * 128 + 2 * 288):,} numbers" in output

    weights, base = torch.load(out, weights_only=True), checkpoint()
    assert weights.keys() == base.keys()
    changed = {name for name, x in weights.items() if not torch.equal(x, base[name])}
    layers = ("att.receptance", "att.key", "att.value", "att.gate", "att.output")
    layers += ("ffn.key", "ffn.value", "ffn.receptance")
    assert changed == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}


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


def test_peak_memory_is_that_of_what_lives_at_one_time() -> None:
    x = torch.zeros(1000, 1000)

    def three_at_a_time() -> None:
        a = x + 1
        b = a + 1
        del a
        c = b + 1
        assert (c + 1).sum() > 0

    assert text_model.peak_memory(three_at_a_time) == pytest.approx(12e6, rel=0.01)


def test_ddp_gives_the_losses_of_one_process(text: Path) -> None:
    environment = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    arguments = ["--data", str(text), "--steps", "8", "--batch-size", "4"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "ddp.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,  # a hang, however busy the machine
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"^  \d+: ([\d.]+) ([\d.]+)$", done.stdout, re.MULTILINE)
    assert len(losses) == 8
    for single, several in losses:
        assert float(several) == pytest.approx(float(single), rel=2e-5)
    assert float(losses[-1][0]) < float(losses[0][0]) - 1
    assert "MEMBER: 2/2" in done.stderr + done.stdout


def test_crops_are_pieces_of_the_text_and_its_next_tokens() -> None:
    text = bytes(range(100))
    batches = iter(text_data.Crops(text, 5, 7, seed=3))
    for tokens, targets in (next(batches), next(batches)):
        assert tokens.shape == targets.shape == (5, 7)
        assert torch.equal(tokens + 1, targets)
    again, _ = next(iter(text_data.Crops(text, 5, 7, seed=3)))
    assert not torch.equal(again, tokens)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (state_tuning.main, ["--checkpoint", "no-such.pth"], "no such file: no-such.pth"),
        (state_tuning.main, ["--length", "100000"], "too few for pieces of 100000"),
        (lora.main, ["--rank", "0"], "--rank: expected an integer of at least 1, got '0'"),
        (lora.main, ["--alpha", "nan"], "--alpha: expected a finite number > 0, got 'nan'"),
        (lora.main, ["--out", __file__ + "/x.pth"], "--out: cannot be written"),
        (state_tuning.main, ["--out", "."], "--out: cannot be written"),
        (state_tuning.main, ["--out", ""], "--out: expected a path, got ''"),
        (state_tuning.main, ["--data", "."], "--data: expected a file, got the folder ."),
        (state_tuning.main, ["--tokenizer", "world"], "--tokenizer: expected one of at most 256"),
        (infctx.main, ["--lr", "-1"], "--lr: expected a finite number > 0, got '-1'"),
        (infctx.main, ["--data", "five"], "the text has 5 bytes: too few for 4 lanes"),
        (ddp.main, ["--data", "five"], "the text has 5 bytes: too few for 16 lanes"),
        (ddp.main, ["--seed", "4294967296"], "--seed: expected an integer of at most 4294967295"),
        (lora.main, ["--data", "no-such.txt"], "no-such.txt"),
        (infctx.main, ["--chunk", "-1"], "expected an integer of at least 1, got '-1'"),
        (ddp.main, ["--batch-size", "3"], "--batch-size: expected a multiple of --processes 2"),
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


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    pytest.importorskip("rwkv", reason="the World vocabulary needs torch_rwkv6[text]")
    return WorldTokenizer()


@pytest.mark.parametrize("main", [lora.main, state_tuning.main], ids=lambda x: x.__module__)
def test_a_world_model_is_trained_on_world_tokens(
    main,
    world: WorldTokenizer,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if main is lora.main:
        pytest.importorskip("peft", reason="the example needs torch_rwkv6[examples]")
    trained = []
    script = sys.modules[main.__module__]
    monkeypatch.setattr(script, "finetune", lambda model, tokens, _: trained.append(tokens))
    monkeypatch.setattr(script, "bits_per_token", lambda *_: 0.0)  # of 65,536 logits, that is long
    monkeypatch.setattr(models, "load_tokenizer", {"world": world}.__getitem__)
    save(RWKV6(65536, 1, 16, 16, lora_mix=4, lora_decay=4), tmp_path / "world.pth")
    arguments = ["--checkpoint", str(tmp_path / "world.pth"), "--data", str(text)]
    arguments += ["--out", str(tmp_path / "out.pth")]
    assert main(arguments) == 0
    ids = world.encode(text.read_text())
    assert trained == [ids[: len(ids) - len(ids) // 10]]
    assert "bits per token" in capsys.readouterr().out
    text.write_bytes(b"caf\xe9 " * 500)
    assert main(arguments) == 2
    assert "--data: expected text in UTF-8" in capsys.readouterr().err


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


@pytest.mark.parametrize("main", [state_tuning.main, generate.main], ids=lambda x: x.__module__)
def test_a_vocabulary_that_decides_nothing_is_refused(
    main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(RWKV6(300, 1, 16, 16, lora_mix=4, lora_decay=4), "model.pth")
    Path("text").write_text("some text " * 50)
    generating = main is generate.main
    assert main(["model.pth"] if generating else ["--checkpoint=model.pth", "--data=text"]) == 2
    assert "--tokenizer: needed for a vocabulary of 300 tokens" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_learnt(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def step(module: text_model.TextModel, *arguments: object) -> torch.Tensor:
        if len(module.losses) == 3:
            signal.raise_signal(signal.SIGINT)
        return training_step(module, *arguments)

    training_step = text_model.TextModel.training_step
    monkeypatch.setattr(text_model.TextModel, "training_step", step)
    out = tmp_path / "state.pth"
    assert state_tuning.main(["--data", str(text), "--steps", "2000", "--out", str(out)]) == 130
    assert all(x.any() for x in torch.load(out, weights_only=True).values())
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("state_tuning.py")]
    assert line == "state_tuning.py: interrupted; what was learnt until then is written"


def test_a_loss_that_is_not_finite_ends_training(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "state.pth"
    arguments = ["--data", str(text), "--steps", "9", "--out", str(out), "--lr", "1e20"]
    assert state_tuning.main(arguments) == 2
    assert "try a smaller --lr" in capsys.readouterr().err
    assert not out.exists()
