"""The command line: text and chats from a checkpoint, what it is, other names or formats for it.

python -m torch_rwkv6 generate MODEL.pth --prompt "In the beginning" --tokenizer world
python -m torch_rwkv6 chat MODEL.pth
python -m torch_rwkv6 info MODEL.pth
python -m torch_rwkv6 convert MODEL.safetensors MODEL.pth
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from torch_rwkv6.files import file_to_write
from torch_rwkv6.models import generate_text, load, load_tokenizer, save
from torch_rwkv6.models.chat import TEMPLATES, Chat
from torch_rwkv6.nn import RWKV

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": "int8",  # of the matrices
}
# Exceptions that a user can act on. FloatingPointError: the logits of the model are NaN.
MISTAKES = (
    FloatingPointError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
INTERRUPTED, PIPE_CLOSED = 130, 141  # exit codes of a shell for SIGINT and SIGPIPE


def generate(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    prompt = args.prompt if args.prompt_file is None else _text(args.prompt_file)
    model = _model(args).eval()
    sampling = _sampling(args)
    pieces = generate_text(
        model, tokenizer, prompt, args.length, stop=args.stop, compiled=args.compile, **sampling
    )
    start = time.perf_counter()
    first = next(pieces, "")  # may fail, so nothing is printed before
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    print(flush=True)
    count = len(pieces.request.tokens)
    figures = f"{count} tokens in {seconds:.2f} s, {count / max(seconds, 1e-9):.1f} tokens/s"
    print(f"{figures}, seed {sampling['seed']}", file=sys.stderr)


def chat(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    template = TEMPLATES[args.template]
    talk = Chat(_model(args).eval(), tokenizer, template, args.system)
    options = {"max_tokens": args.length, **_sampling(args)}
    # Makes sure that it will do, before anybody has typed anything
    next(talk.answer("hi", **options | {"max_tokens": 1}), "")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text: see _turn
    if sys.stdin.isatty():
        print(f"{_CHAT_HELP}\n", file=sys.stderr)
    for line in _lines(f"{template.user}: "):
        word, _, name = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word.startswith("/"):
            _keep_going(_chat_command, talk, word, name.strip())
            continue
        _keep_going(_turn, talk, line, options)
        options["seed"] += 1  # or a question asked twice would be answered by the same draws


def _turn(talk: Chat, line: str, options: dict[str, Any]) -> None:
    pieces = talk.answer(line, **options)  # raises for what the tokenizer cannot read
    print(talk.template.opening, end="", flush=True)
    answer = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
    except KeyboardInterrupt:  # ends the answer; at the prompt it ends the chat
        print(" ...", end="")
    finally:
        print("\n", flush=True)
    talk.remember(line, answer)


def _keep_going(run: Callable[..., None], *args: Any) -> None:
    """Runs a part of a chat. A mistake is told, and the chat goes on from where it was."""
    try:
        run(*args)
    except BrokenPipeError:
        raise
    except (FloatingPointError, OSError, TypeError, ValueError) as error:
        print(f"torch_rwkv6: error: {_one_line(error)}", file=sys.stderr)


_CHAT_HELP = "/undo  /save FILE  /load FILE  /quit  (Ctrl-C ends an answer)"


def _chat_command(talk: Chat, word: str, name: str) -> None:
    if word == "/undo" and not name:
        print("the last turn is undone" if talk.undo() else "there is no turn to undo")
    elif word == "/save" and name:
        talk.save(name)
        print(f"saved to {name}")
    elif word == "/load" and name:
        talk.load(name)
        print(f"going on from {name}")
    else:
        print(_CHAT_HELP)


def _lines(prompt: str) -> Iterator[str]:
    """What the user types, or what comes from a pipe, line by line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() lets edit lines with it
    while True:
        try:
            line = input(prompt if sys.stdin.isatty() else "").strip()
        except EOFError:  # Ctrl-D, or the end of a file
            return print()
        if line:
            yield line


def _text(name: str) -> str:
    """The text of a file, or of stdin for -."""
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file: expected text in UTF-8, got {error}") from error


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "alpha_presence": args.presence,
        "alpha_frequency": args.frequency,
        "seed": secrets.randbits(31) if args.seed is None else args.seed,
    }


def info(args: argparse.Namespace) -> None:
    model = _model(args)
    shape = model.state_shape
    heads = "" if len(shape) == 2 else f", {shape[0]} heads of {shape[1]}"
    parameters = [*model.parameters(), *model.buffers()]  # buffers: those of int8
    embedding = model.emb.weight
    read = _bytes(parameters) - _bytes([embedding]) + _bytes([embedding[0]])
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    for name, value in (
        ("version", f"RWKV-{model.version}"),
        ("layers", f"{model.n_layer}"),
        ("width", f"{model.n_embd}{heads}"),
        ("hidden width", f"{model.blocks[0].ffn.key.weight.shape[0]}"),
        ("vocabulary", f"{model.vocab_size}"),
        ("parameters", f"{sum(p.numel() for p in parameters):,}"),
        ("dtype", ", ".join(dtypes)),
        ("weights", _mib(_bytes(parameters))),
        ("read per token", _mib(read)),
        ("state", f"{_mib(_bytes(model.initial_state(1)))} a sequence, at every length"),
    ):
        print(f"{name:<16}{value}")


def convert(args: argparse.Namespace) -> None:
    file_to_write(args.out)
    model = _model(args)
    save(model, args.out)
    count = len(model.state_dict())
    print(f"{args.out}: RWKV-{model.version}, {count} tensors under the official names")


def _model(args: argparse.Namespace) -> RWKV:
    dtype = DTYPES[args.dtype] if args.dtype else None
    return load(
        args.checkpoint,
        getattr(args, "device", None),
        dtype,
        state=args.state,
        lora=args.lora,
        ln_x_eps=args.ln_x_eps,
    )


def _one_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines())
    return text or type(error).__name__


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torch_rwkv6",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: object, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            run.__name__,  # type: ignore[attr-defined]
            help=summary,
            description=summary,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("checkpoint", help=".pth or .safetensors, or a Hugging Face folder")
        sub.add_argument("--dtype", choices=DTYPES, help="of the parameters; as in the file")
        sub.add_argument("--ln-x-eps", type=float, help="epsilon of the GroupNorm (v5, v6): 64e-5")
        sub.add_argument("--state", help="file of tuned states to start from")
        sub.add_argument("--lora", help="folder of a LoRA to merge, as peft saves it")
        return sub

    def writes(sub: argparse.ArgumentParser, tokenizer: str, length: int) -> None:
        sub.add_argument(
            "--tokenizer", default=tokenizer, help="bytes, bytes:ENCODING, world or a .json"
        )
        sub.add_argument("--length", type=int, default=length, help="number of tokens at most")
        sub.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest")
        sub.add_argument("--top-k", type=int, default=0, help="only the k likeliest; 0 is all")
        sub.add_argument("--top-p", type=float, default=0.85, help="only so much of the likeliest")
        sub.add_argument("--presence", type=float, default=0.0, help="penalty of a token seen")
        sub.add_argument("--frequency", type=float, default=0.0, help="penalty each time it was")
        sub.add_argument("--seed", type=int, help="same seed, same text; a new one if not given")
        sub.add_argument("--device", default="cpu", help="cpu, cuda, ...")

    sub = command(generate, "writes text that follows a prompt")
    prompt = sub.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="\n", help="text to go on from")
    prompt.add_argument("--prompt-file", help="file of that text, as it is; - is stdin")
    writes(sub, tokenizer="bytes", length=200)
    sub.add_argument("--stop", action="append", default=[], help="a text to end before")
    sub.add_argument("--compile", action="store_true", help="compile the step: slow to start")
    sub = command(chat, "answers what is typed, or comes by a pipe, line by line")
    writes(sub, tokenizer="world", length=500)
    sub.add_argument("--template", choices=TEMPLATES, default="chat", help="how turns are written")
    sub.add_argument("--system", default="", help="instructions at the beginning")
    command(info, "says what a checkpoint is")
    sub = command(convert, "writes a checkpoint under the official names, as .pth or .safetensors")
    sub.add_argument("out", help=".safetensors, or any other name for a .pth")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 2 after a mistake, which is reported in one line."""
    code, message = 0, ""
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for characters that the terminal cannot show
        args = _parser().parse_args(argv)
        args.run(args)
        print(end="", flush=True)  # reports a full disk here, not when Python exits
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        code = PIPE_CLOSED
    except MISTAKES as error:
        code, message = 2, f"torch_rwkv6: error: {_one_line(error)}"
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # otherwise Python would flush again at its exit and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
