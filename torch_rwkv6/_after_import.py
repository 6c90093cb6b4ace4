"""Code that waits for the import of a module that few programs need and that is slow to import."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(module: str, run: Callable[[], None]) -> None:
    """Calls `run` once the module has been imported: now, where it has been."""
    if module in sys.modules:
        run()
    else:
        sys.meta_path.insert(0, _Finder(module, run))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module by the finders behind it, and has `run` called after its code."""

    def __init__(self, module: str, run: Callable[[], None]) -> None:
        self.module, self.run = module, run

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in behind)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.run()
                if self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = exec_module
        return spec
