"""The examples of docs/keras.md: those for every backend, and those whose title names this one."""

import re
from pathlib import Path

from backend import BACKEND

PAGE = Path(__file__).parents[2] / "docs/keras.md"
BLOCK = r'^```python(?: title="KERAS_BACKEND=(\w+)")?\n(.*?)^```'


def test_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for wanted, code in re.findall(BLOCK, PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        if wanted in ("", BACKEND):
            exec(code, scope)
    assert scope["y"].shape == (2, 100, 128)
