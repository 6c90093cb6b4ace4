"""Chats: how turns are written, what a conversation remembers, and the command line's."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_line import assert_refused

from torch_rwkv6.__main__ import main
from torch_rwkv6.models import generate_text, load, load_tokenizer, save
from torch_rwkv6.models.chat import TEMPLATES, Chat, ChatTemplate
from torch_rwkv6.nn import RWKV, RWKVState

KJV = Path(__file__).parent / "data" / "rwkv6-kjv.pth"
TOKENIZER = load_tokenizer("bytes")
GREEDY = {"temperature": 0.0, "max_tokens": 30}


@pytest.fixture(scope="module")
def model() -> RWKV:
    return load(KJV, dtype=torch.float32).eval()


def state_after(model: RWKV, text: str) -> RWKVState:
    with torch.no_grad():
        return model(torch.tensor([TOKENIZER.encode(text)]))[1]


def assert_states_close(found: RWKVState, expected: RWKVState) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# ---- templates


def test_the_forms_of_the_world_models() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What is\r\n\r\n\n a finch?\n"},
        {"role": "assistant", "content": "A bird.\n\nIt sings."},
        {"role": "user", "content": "And a\nwren?"},
    ]
    assert TEMPLATES["chat"].prompt(messages) == (
        "System: Be brief.\n\nUser: What is\n a finch?\n\nAssistant: A bird.\nIt sings.\n\n"
        "User: And a\nwren?\n\nAssistant:"
    )
    assert TEMPLATES["qa"].prompt(messages[3:]) == "Question: And a\nwren?\n\nAnswer:"
    assert TEMPLATES["chat"].stops == ("\n\nUser:",)
    assert TEMPLATES["qa"].stops == ("\n\nQuestion:",)
    developer = [{"role": "developer", "content": "Be brief."}]
    assert TEMPLATES["chat"].prompt(developer) == "System: Be brief.\n\nAssistant:"


def test_messages_that_are_none() -> None:
    with pytest.raises(ValueError, match="messages: expected at least one, got none"):
        TEMPLATES["chat"].prompt([])
    with pytest.raises(ValueError, match=r"role: expected system, .*, got 'tool'"):
        TEMPLATES["chat"].prompt([{"role": "tool", "content": "x"}])


# ---- a conversation


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_that_to_the_whole_chat(name: str, model: RWKV) -> None:
    template = TEMPLATES[name]
    chat, messages = Chat(model, TOKENIZER, template, "Be brief."), []
    messages.append({"role": "system", "content": "Be brief."})
    for question in ("Who is he?", "And she?", "Who is he?"):
        messages.append({"role": "user", "content": question})
        whole = template.prompt(messages)
        answer = "".join(chat.answer(question, **GREEDY))
        assert answer == "".join(generate_text(model, TOKENIZER, whole, 30, temperature=0.0))
        assert answer == "".join(chat.answer(question, **GREEDY))  # it has not changed the chat
        chat.remember(question, answer)
        messages.append({"role": "assistant", "content": answer})
        seen = template.prompt(messages).removesuffix(template.opening)
        assert_states_close(chat.states[-1], state_after(model, seen))


class StopsAt(ChatTemplate):
    """Stops at a text that the model writes: it never begins a question."""

    text = ""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.text,)


def test_an_answer_ends_at_the_stops_of_the_template(model: RWKV) -> None:
    whole = "".join(Chat(model, TOKENIZER).answer("Who?", **GREEDY))
    template = StopsAt("System", "User", "Assistant")
    StopsAt.text = whole[12:17]
    found = "".join(Chat(model, TOKENIZER, template).answer("Who?", **GREEDY))
    assert found == whole[: whole.index(whole[12:17])]


def test_undo_save_and_load(model: RWKV, tmp_path: Path) -> None:
    chat = Chat(model, TOKENIZER)
    assert not chat.undo()
    chat.remember("Who?", " He.")
    first = chat.states[-1]
    chat.remember("And she?", " She.")
    chat.save(tmp_path / "chat.safetensors")
    second = chat.states[-1]
    assert chat.undo()
    assert chat.states[-1] is first
    for other in (chat, Chat(model, TOKENIZER)):
        before = other.states[-1]
        other.load(tmp_path / "chat.safetensors")
        assert_states_close(other.states[-1], second)
        assert other.undo()
        assert other.states[-1] is before
    small = Chat(load(model.state_dict(), dtype=torch.bfloat16), TOKENIZER)
    small.load(tmp_path / "chat.safetensors")  # of a model of another dtype
    assert "".join(small.answer("And they?", **GREEDY))
    state = RWKVState.load(tmp_path / "chat.safetensors")
    state.select([0, 0]).save(tmp_path / "two.pth")
    for name, error in (("none.pth", FileNotFoundError), ("two.pth", ValueError)):
        with pytest.raises(error):
            chat.load(tmp_path / name)
    assert chat.states[-1] is first


# ---- the command line


@pytest.fixture(scope="module")
def checkpoint(model: RWKV, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "kjv.pth"
    save(model, path)
    return str(path)


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


OPTIONS = ("--tokenizer", "bytes", "--temperature", "0", "--length", "30")


def test_chat_command(
    model: RWKV,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat, answers = Chat(model, TOKENIZER, system="Be brief."), []
    for question in ("Who is he?", "And she?"):
        answers.append("".join(chat.answer(question, **GREEDY)))
        chat.remember(question, answers[-1])
    saved = tmp_path / "state.pth"
    lines = ["", "Who is he?", "And they?", "/undo", f"/save {saved}", "And she?", "/undo", "/undo"]
    lines += ["/undo", f"/load {saved}", "And she?", "/load none.pth", "/help", "/quit", "Who?"]
    typed(monkeypatch, "\n".join(lines))
    assert main(["chat", checkpoint, *OPTIONS, "--system", "Be brief."]) == 0
    captured = capsys.readouterr()
    blocks = captured.out.split("Assistant:")
    assert blocks[1] == f"{answers[0]}\n\n"
    assert blocks[3].startswith(f"{answers[1]}\n\nthe last turn is undone\n")
    assert blocks[3].count("the last turn is undone") == 2
    assert "there is no turn to undo" in blocks[3]
    assert f"going on from {saved}" in blocks[3]
    assert blocks[4].startswith(f"{answers[1]}\n\n")
    assert "/undo" in blocks[4]
    assert len(blocks) == 5
    assert captured.err.startswith("torch_rwkv6: error: ")
    assert "none.pth" in captured.err
    assert captured.err.count("\n") == 1


def test_a_line_that_is_no_text_does_not_end_the_chat(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "Who is he?\nAnd she?\n")
    assert main(["chat", checkpoint, *OPTIONS]) == 0
    expected = capsys.readouterr().out
    raw = io.BytesIO(b"Who is he?\nW\xffo?\nAnd she?\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, "utf-8"))
    assert main(["chat", checkpoint, *OPTIONS]) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert captured.err.startswith("torch_rwkv6: error: prompt: expected text that the tokenizer")
    assert captured.err.count("\n") == 1


def test_chats_from_tuned_states_in_the_qa_form(
    model: RWKV,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = model.state_shape
    states = {f"blocks.{i}.att.time_state": 1000 * torch.randn(shape) for i in range(model.n_layer)}
    save(states, tmp_path / "tuned.pth")
    tuned = load(checkpoint, state=states).eval()
    chat = Chat(tuned, TOKENIZER, TEMPLATES["qa"])
    answer = "".join(chat.answer("Who?", **GREEDY))
    assert answer != "".join(Chat(model, TOKENIZER, TEMPLATES["qa"]).answer("Who?", **GREEDY))
    typed(monkeypatch, "Who?")
    arguments = ["--template", "qa", "--state", str(tmp_path / "tuned.pth")]
    assert main(["chat", checkpoint, *OPTIONS, *arguments]) == 0
    assert capsys.readouterr().out == f"Answer:{answer}\n\n\n"


def test_seeds_differ_unless_they_are_given(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(*arguments: str) -> str:
        typed(monkeypatch, "Who?\nWho?\n")
        assert main([*arguments, "--tokenizer", "bytes", "--length", "40"]) == 0
        return capsys.readouterr().out

    for command in ("generate", "chat"):
        assert written(command, checkpoint) != written(command, checkpoint)
        seeded = (command, checkpoint, "--seed", "3")
        assert written(*seeded) == written(*seeded)
    first, second = written("chat", checkpoint, "--seed", "3").split("Assistant:")[1:]
    assert first.strip() != second.strip()


def test_prompts_from_files_and_pipes(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def written(*arguments: str) -> str:
        assert main(["generate", checkpoint, "--temperature", "0", *arguments]) == 0
        captured = capsys.readouterr()
        assert ", seed " in captured.err
        return captured.out

    text = "And God said,\nLet there be \N{SNOWMAN}"
    expected = written("--prompt", text)
    assert expected.startswith(text)
    (tmp_path / "prompt.txt").write_text(text, "utf-8")
    assert written("--prompt-file", str(tmp_path / "prompt.txt")) == expected
    typed(monkeypatch, text)
    assert written("--prompt-file", "-") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "none.pth", "--tokenizer", "bytes"], "no such file: none.pth"),
        (["chat", "CHECKPOINT", "--tokenizer", "other"], "tokenizer: expected"),
        (["chat", "CHECKPOINT", "--tokenizer", "bytes", "--temperature", "-1"], "temperature"),
        (["chat", "CHECKPOINT", "--tokenizer", "bytes", "--device", "cuda:99"], "device: expected"),
        (["chat", "CHECKPOINT", "--tokenizer", "bytes", "--state", "none.pth"], "no such file"),
        (
            ["chat", "CHECKPOINT", "--tokenizer", "bytes", "--state", "CHECKPOINT"],
            "state: expected",
        ),
        (["info", "CHECKPOINT", "--lora", "."], "lora: expected"),
        (["generate", "CHECKPOINT", "--prompt-file", "none.txt"], "none.txt"),
        (["generate", "CHECKPOINT", "--prompt-file", "."], "directory"),
        (["generate", "CHECKPOINT", "--prompt-file", "CHECKPOINT"], "--prompt-file: expected text"),
    ],
    ids=str,
)
def test_errors_are_one_line(
    arguments: list[str], message: str, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [checkpoint if a == "CHECKPOINT" else a for a in arguments]
    assert assert_refused(main, "torch_rwkv6", given, message, capsys) == ""


def test_ctrl_c_ends_an_answer_and_then_the_chat(checkpoint: str) -> None:
    arguments = ["chat", checkpoint, "--tokenizer", "bytes", "--length", "100000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch_rwkv6", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Who is he?\n")
    process.stdin.flush()
    assert process.stdout.read(30).startswith(b"Assistant:")
    process.send_signal(signal.SIGINT)
    rest = b""
    while not rest.endswith(b" ...\n\n"):
        part = process.stdout.read1(4096)
        assert part
        rest += part
    process.stdin.write(b"/undo\n")  # the answer so far is a turn
    process.stdin.flush()
    assert process.stdout.readline() == b"the last turn is undone\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out, error) == (130, b"", b"")
