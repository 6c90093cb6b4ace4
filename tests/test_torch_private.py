"""The private names of torch stand in one file, and the installed torch has them."""

import re
from pathlib import Path

import torch

import torch_rwkv6

PACKAGE = Path(torch_rwkv6.__file__).parent
PRIVATE = re.compile(r"\b(?:torch|forward_ad|pytree)(?:\.\w+)*\._[a-zA-Z]\w*(?:\.\w+)*")
PUBLIC = {"torch._check_value"}  # documented, in spite of its name


def names(file: Path) -> set[str]:
    code = "\n".join(line.split("#")[0] for line in file.read_text().splitlines())
    code = re.sub(r'"""(.|\n)*?"""', "", code)
    return set(PRIVATE.findall(code)) - PUBLIC


def test_the_installed_torch_has_them():
    missing = []
    for name in sorted(names(PACKAGE / "_torch_private.py")):
        found = torch
        for part in name.split(".")[1:]:
            found = getattr(found, part, None)
        if found is None:
            missing.append(name)
    assert not missing, f"torch {torch.__version__} lacks {', '.join(missing)}"


def test_they_stand_nowhere_else():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "keras_adapter").rglob("*.py")]
    elsewhere = {file.name: names(file) for file in files if file.name != "_torch_private.py"}
    assert not any(elsewhere.values()), elsewhere
