"""The example programs, run as a user runs them, on a tiny text."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_line import assert_refused

pytest.importorskip("lightning", reason="the examples need torch_rwkv6[examples]")
pytest.importorskip("matplotlib", reason="the examples need torch_rwkv6[examples]")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # as running a script does
import cli  # noqa: E402
import generate  # noqa: E402
import train_lm  # noqa: E402

CHECKPOINT = str(Path(__file__).parent / "data" / "rwkv6-kjv.pth")
SMALL = ["--n-layer", "1", "--n-embd", "32", "--head-size", "16", "--lora-mix", "4"]
SMALL += ["--batch-size", "4", "--length", "16", "--val-every", "10"]


def run(script: str, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of the script in a process of its own, which must succeed."""
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        timeout=600,  # a hang, however busy the machine
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8"), done.stderr.decode()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "zähl.txt"
    path.write_text("eins zwei drei vier fünf sechs sieben acht neun zehn\n" * 200, "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    arguments = ["--data", str(text), "--out", str(out), "--steps", "30", *SMALL]
    report, errors = run("train_lm.py", *arguments)
    assert errors == ""  # no tips and deprecation warnings of other packages
    assert "Tip" not in report
    for words in ("validation bits per character", "unigram", "bigram", "Sample:"):
        assert words in report
    return out


def losses(out: Path, version: int, name: str) -> dict[int, float]:
    with (out / f"log/version_{version}/metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def test_training_learns_and_writes_everything(trained: Path) -> None:
    bits = losses(trained, 0, "val_bits_per_char")
    assert list(bits) == [9, 19, 29]
    assert bits[29] < bits[9]
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights = torch.load(trained / "model.pth", weights_only=True)
    assert len(weights) == 28 + 6


def test_resuming_equals_not_having_stopped(
    trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", str(text), "--out", str(tmp_path), "--steps", "30", *SMALL]
    trainer = train_lm.lightning.Trainer
    with monkeypatch.context() as patch:  # a run of 30 steps that is killed after 15
        patch.setattr(train_lm.lightning, "Trainer", lambda **kw: trainer(**kw | {"max_steps": 15}))
        assert train_lm.main(arguments) == 0
    # the settings of the model and the number of steps come from the checkpoint
    resume = ["--resume", str(tmp_path / "last.ckpt"), "--val-every", "10"]
    assert train_lm.main([*arguments[:4], *resume]) == 0
    for name in ("train_loss", "val_loss"):
        whole, resumed = losses(trained, 0, name), losses(tmp_path, 1, name)
        assert resumed[29] == pytest.approx(whole[29], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--steps: expected more than the 30 steps that {} has done, got 30"),
        (["--steps", "20"], "--steps: expected more than the 30 steps that {} has done, got 20"),
        (["--steps", "40", "--lr", "0.5"], "--lr: expected 0.006, as the run of --resume has, got"),
        (
            ["--steps", "40", "--data", __file__],
            "--data: expected the text of the run, got another",
        ),
    ],
)
def test_a_run_that_cannot_go_on(
    trained: Path, text: Path, tmp_path: Path, arguments: list[str], message: str, capsys
) -> None:
    resume = ["--resume", str(trained / "last.ckpt"), "--out", str(tmp_path), "--data", str(text)]
    assert train_lm.main([*resume, *arguments]) == 2
    assert message.format(trained / "last.ckpt") in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_learnt(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def step(module: train_lm.LanguageModel, *arguments: object) -> torch.Tensor:
        if module.global_step == 12:
            signal.raise_signal(signal.SIGINT)
        return training_step(module, *arguments)

    training_step = train_lm.LanguageModel.training_step
    arguments = ["--data", str(text), "--out", str(tmp_path), "--steps", "2000", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(train_lm.LanguageModel, "training_step", step)
        assert train_lm.main(arguments) == 130
    assert "train_lm.py: interrupted; what was learnt" in capsys.readouterr().err
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 13
    weights = torch.load(tmp_path / "model.pth", weights_only=True)
    assert all(torch.equal(x, checkpoint["state_dict"][f"model.{n}"]) for n, x in weights.items())


def test_other_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    @cli.command
    def interrupted(_: list[str] | None) -> None:
        raise KeyboardInterrupt

    assert interrupted() == 130
    assert capsys.readouterr().err == "test_examples.py: interrupted\n"
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import cli; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "-c: interrupted\n")


def test_output_ends_with_its_reader() -> None:
    command = [sys.executable, str(EXAMPLES / "generate.py"), CHECKPOINT, "--length", "100000000"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.read(5)
        process.stdout.close()  # as `| head -c 5`
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_trying_an_output_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "folder/file"
    cli.try_file(file)
    assert list(tmp_path.glob("**/*")) == [file.parent]
    file.write_text("mine")
    cli.try_file(file)
    cli.try_folder(file.parent)
    assert file.read_text() == "mine"
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(OSError, match="file"):
        cli.try_folder(file)


def test_bf16_and_a_time_limit(text: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(text), "--out", str(tmp_path), "--max-seconds", "1"]
    limit = ["--steps", "100000", "--precision", "bf16-mixed"]
    assert train_lm.main([*arguments, *SMALL, *limit]) == 0
    weights = torch.load(tmp_path / "model.pth", weights_only=True)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in weights.values())


def test_generation_is_reproducible(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "eins zwei für", "--length", "40"]
    first, figures = run("generate.py", str(trained / "model.pth"), *arguments)
    assert first.startswith("eins zwei für")
    assert "tokens/s" in figures
    assert "state 2.2 KiB" in figures  # 2 * 32 + 2 * 16 * 16 float32
    for file, seed, same in (("last.ckpt", "0", True), ("model.pth", "1", False)):
        assert generate.main([str(trained / file), *arguments, "--seed", seed]) == 0
        assert (capsys.readouterr().out == first) is same


def test_the_default_text_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train_lm.main([]) == 2
    assert "pip install torch_rwkv6[examples]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("generate.py", ["no-such.pth"], "no such file: no-such.pth"),
        ("generate.py", [__file__], "is no checkpoint"),
        ("train_lm.py", ["--data", "no-such.txt"], "no-such.txt"),
        ("train_lm.py", ["--data", __file__, "--resume", "no-such.ckpt"], "no-such.ckpt"),
        ("train_lm.py", ["--data", __file__, "--head-size", "7"], "head_size"),
        ("train_lm.py", ["--data", __file__, "--batch-size", "100000"], "too few"),
        ("train_lm.py", ["--data", "."], "--data: expected a file, got the folder ."),
        ("train_lm.py", ["--steps", "0"], "--steps: expected an integer of at least 1, got '0'"),
        ("train_lm.py", ["--batch-size", "0"], "--batch-size: expected an integer of at least 1"),
        (
            "train_lm.py",
            ["--length", "-1"],
            "--length: expected an integer of at least 1, got '-1'",
        ),
        ("train_lm.py", ["--length", "9" * 30], "--length: expected an integer of at most"),
        ("train_lm.py", ["--lr", "nan"], "--lr: expected a finite number > 0, got 'nan'"),
        ("train_lm.py", ["--lr", "-1"], "--lr: expected a finite number > 0, got '-1'"),
        ("train_lm.py", ["--weight-decay", "-1"], "--weight-decay: expected a finite number >= 0"),
        ("train_lm.py", ["--seed", "-1"], "--seed: expected an integer of at least 0, got '-1'"),
        ("train_lm.py", ["--max-seconds", "0"], "--max-seconds: expected a finite number > 0"),
        ("train_lm.py", ["--accelerator", "foo"], "--accelerator: expected one of auto, cpu"),
        ("train_lm.py", ["--out", ""], "--out: expected a path, got ''"),
        ("train_lm.py", ["--out", __file__], "--out: cannot be written"),
        ("train_lm.py", ["--resume", CHECKPOINT], "--resume: expected a training checkpoint"),
        ("train_lm.py", ["--resume", __file__], "is no checkpoint"),
        ("generate.py", [CHECKPOINT, "--length", "0"], "--length: expected an integer of at least"),
        ("generate.py", [CHECKPOINT, "--temperature", "nan"], "--temperature: expected a finite"),
        ("generate.py", [CHECKPOINT, "--top-p", "0"], "--top-p: expected a finite number > 0"),
        ("generate.py", [CHECKPOINT, "--seed", "-1"], "--seed: expected an integer of at least 0"),
        ("generate.py", [CHECKPOINT, "--device", "foo"], "device: expected one of this machine"),
        ("generate.py", [CHECKPOINT, "--tokenizer", "world"], "--tokenizer: expected one of at"),
        ("generate.py", [CHECKPOINT, "--tokenizer", "foo"], "expected bytes, world or a .json"),
    ],
    ids=lambda x: (
        " ".join(x).replace(__file__, "THIS").replace(CHECKPOINT, "MODEL")
        if isinstance(x, list)
        else ""
    ),
)
def test_errors_are_one_line(
    script: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main = {"generate.py": generate.main, "train_lm.py": train_lm.main}[script]
    assert assert_refused(main, script, arguments, message, capsys) == ""
