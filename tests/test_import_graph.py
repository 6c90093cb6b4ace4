"""Imports and includes run down one stair: nothing reaches up again or goes in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"

# The modules and folders of torch_rwkv6 from the bottom up; each may import its own layer and those
# before it. The face is torch_rwkv6/__init__.py, which `import torch_rwkv6` names.
FACE = "__init__"
LAYERS = (
    {"version", "_torch_private", "_after_import", "arguments", "files"},
    {"_library", "contract"},
    {"checks", "reference", "reference4", "chunked"},
    {"registration"},
    {"ops"},
    {"nn", "compat"},
    {"models", "parallel"},
    {FACE},
    {"__main__", "hf", "onnx"},
)

Graph = Mapping[str, set[str]]


def modules(package: str) -> dict[str, ast.Module]:
    """The modules of a package by their dotted names."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text())
    return found


def imported(nodes: Iterable[ast.AST], known: Iterable[str] = ()) -> set[str]:
    """The modules that import statements name: ``from a import b`` is a.b where that is known."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else str(node.module) for name in whole}
    return names


def import_graph(package: str) -> Graph:
    """For each module of a package those of the package that it imports, wherever it does."""
    trees = modules(package)
    return {name: imported(ast.walk(tree), trees) & trees.keys() for name, tree in trees.items()}


def include_graph() -> Graph:
    """For each file of csrc those of csrc that it includes."""
    files = [f for f in CSRC.rglob("*") if f.suffix in {".h", ".cpp", ".cu", ".cuh", ".inc"}]
    graph = {}
    for file in files:
        texts = re.findall(r'^\s*#\s*include "([^"]+)"', file.read_text(), re.MULTILINE)
        places = [[folder / t for folder in (file.parent, CSRC, CSRC / "include")] for t in texts]
        found = (next((p for p in candidates if p.is_file()), None) for candidates in places)
        names = {p.resolve().relative_to(CSRC).as_posix() for p in found if p is not None}
        graph[file.relative_to(CSRC).as_posix()] = names
    return graph


def circle(graph: Graph) -> list[str]:
    """A path that ends where it began; empty where there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(graph[name]):
            found = search(following, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next(filter(None, (search(name, []) for name in sorted(graph))), [])


def reached(graph: Graph, start: str) -> set[str]:
    """All that a file includes, directly or not."""
    found, rest = set(), {start}
    while rest:
        following = graph[rest.pop()] - found
        found |= following
        rest |= following
    return found


def layer(module: str) -> int:
    part = module.split(".")[1] if "." in module else FACE
    levels = [i for i, parts in enumerate(LAYERS) if part in parts]
    assert levels, f"{module} is in none of LAYERS"
    return levels[0]


def test_imports_run_down():
    graph = import_graph("torch_rwkv6")
    assert len(graph) > 20
    layers = {name: layer(name) for name in graph}
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if layers[other] > layers[name]
    ]
    assert not upward


@pytest.mark.parametrize("package", ["torch_rwkv6", "keras_adapter"])
def test_imports_go_in_no_circle(package):
    assert circle(import_graph(package)) == []


def unguarded(node: ast.AST) -> Iterable[ast.AST]:
    """All nodes but those of ``if ... == "torch":``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "== 'torch'" in ast.unparse(child.test):
            for other in child.orelse:
                yield from unguarded(other)
        else:
            yield from unguarded(child)


def test_keras_adapter_imports_torch_only_on_its_torch_backend():
    trees = modules("keras_adapter")
    graph = {name: imported(unguarded(tree), trees) for name, tree in trees.items()}
    everywhere, rest = set(), {"keras_adapter", "keras_adapter.backends"}
    while rest:
        everywhere |= rest
        rest = {other for name in rest for other in graph[name] if other in trees} - everywhere
    assert {"keras_adapter.backends.jax", "keras_adapter.backends.tensorflow"} <= everywhere
    assert "keras_adapter.backends.torch" not in everywhere
    for name in everywhere:
        assert not {"torch", "torch_rwkv6"} & {n.split(".")[0] for n in graph[name]}, name


def test_only_hf_imports_transformers():
    for name, tree in modules("torch_rwkv6").items():
        found = {other.split(".")[0] for other in imported(ast.walk(tree))}
        assert "transformers" not in found or name.split(".")[1:2] == ["hf"], name


def test_includes_go_in_no_circle():
    assert circle(include_graph()) == []


def test_kernels_include_nothing_from_above():
    """The kernels of one device include nothing of the other's, of the bindings or of an entry
    point: what they share with those includes nothing of theirs."""
    graph = include_graph()
    kernels = [name for name in graph if name.startswith(("cpu/", "cuda/"))]
    assert len(kernels) > 30
    for name in kernels:
        own = name.split("/")[0]
        for other in graph[name]:
            if other.split("/")[0] != own:
                device = {
                    o for o in {other} | reached(graph, other) if o.startswith(("cpu", "cuda"))
                }
                assert not device, f"{name} includes {other}, which includes {device}"
    for name, others in graph.items():
        if not name.startswith("bindings/"):
            assert not any(o.startswith("bindings/") for o in others), name


def test_only_the_bindings_know_a_framework():
    framework = re.compile(
        r'#\s*include [<"]((?:torch|ATen|c10|xla|jax|tensorflow|Python)\b[^>"]*)'
    )
    for name in include_graph():
        found = set(framework.findall((CSRC / name).read_text())) - {"ATen/dlpack.h"}
        assert not found or name.startswith("bindings/"), f"{name} includes {found}"
