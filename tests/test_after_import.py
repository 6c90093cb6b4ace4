"""What waits for a slow module runs once, right after the module, and never imports it."""

import importlib.util
import sys

import pytest

from torch_rwkv6._after_import import after_import


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that has not been imported, and counts how often it is."""
    (tmp_path / "slow_to_import.py").write_text("ready = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "slow_to_import"
    sys.modules.pop("slow_to_import", None)


def test_runs_after_the_modules_own_code(module):
    seen, finders = [], list(sys.meta_path)
    for i in range(2):
        after_import(module, lambda i=i: seen.append((i, sys.modules[module].ready)))
    assert importlib.util.find_spec(module) is not None  # looking is not importing
    assert seen == []
    importlib.import_module(module)
    assert sorted(seen) == [(0, True), (1, True)]
    assert sys.meta_path == finders
    importlib.import_module(module)
    after_import(module, lambda: seen.append("at once"))
    assert seen[2:] == ["at once"]
    assert sys.meta_path == finders


def test_a_module_that_fails_may_be_imported_again(module, tmp_path):
    seen = []
    after_import("fails_at_first", lambda: seen.append(True))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fails_at_first")
    file = tmp_path / "fails_at_first.py"
    file.write_text("raise ImportError('not yet')\n")
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("fails_at_first")
    assert seen == []
    file.write_text("")
    importlib.import_module("fails_at_first")
    assert seen == [True]
