"""README.md and docs/: their examples run, and the files that they name are there.

Those of docs/keras.md run with the tests of the adapter, on every backend, those of
docs/parallel.md on two processes, in tests/test_parallel.py, and those of docs/export.md in
tests/test_export.py and tests/test_onnx.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from torch_rwkv6.models import save
from torch_rwkv6.nn import RWKV6

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "csrc/README.md", "benchmarks/README.md")
    for path in ROOT.glob(pattern)
)
RUN = ["docs/coming-from.md", "docs/models.md", "docs/operator.md", "docs/transformers.md"]
CHECKPOINT = "RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth"  # what the pages call one


def blocks(page: str) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"^```python[^\n]*\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)


def test_every_page_with_examples_is_run() -> None:
    with_examples = [page for page in PAGES if blocks(page)]
    elsewhere = ["README.md", "docs/export.md", "docs/keras.md", "docs/parallel.md"]
    assert with_examples == sorted([*elsewhere, *RUN])


@pytest.mark.parametrize("page", ["README.md", *RUN])
def test_examples(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rwkv", reason="the World tokenizer comes from it")
    monkeypatch.chdir(tmp_path)
    save(RWKV6(65536, 1, 32, 16, lora_mix=4, lora_decay=4), CHECKPOINT)
    scope: dict[str, object] = {}
    for code in blocks(page):
        exec(code, scope)


def test_three_lines_are_the_operator() -> None:
    call, lines, *_ = blocks("README.md")
    scope: dict[str, torch.Tensor] = {}
    exec(call, scope)
    y, state = scope["y"], scope["state"]
    exec(lines, scope)
    torch.testing.assert_close(scope["y"], y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scope["state"], state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing = {link for link in links if not (ROOT / page).parent.joinpath(link).exists()}
    folders = ("benchmarks", "csrc", "docs", "examples", "keras_adapter", "tests", "torch_rwkv6")
    names = re.findall(rf"`((?:{'|'.join(folders)})/[\w./]*)`", text)
    missing |= {name for name in names if not (ROOT / name).exists()}
    assert not missing


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
