"""Sphinx builds the site from the Markdown files where they lie: `make docs`, into build/site."""

import os
import sys
from pathlib import Path

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("KERAS_BACKEND", "numpy")  # keras_adapter is imported for its docstrings

project = html_title = "torch_rwkv6"
root_doc = "README"
include_patterns = [
    "*.md",
    "benchmarks/README.md",
    "csrc/README.md",
    "docs/*.md",
    "docs/*/*.md",
    "docs/benchmarks/*/*.md",
    "examples/article/README.md",
    "tests/ptxcpu/README.md",
]
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_heading_anchors = 3

# An unresolved reference is an error: what `...` in a docstring names must be documented, or belong
# to one of these packages. A word that is no name stands in ``...``.
# A name without its module is enough where one documented object ends with it.
nitpicky = True
default_role = "py:obj"
nitpick_ignore_regex = [(r"py:.*", r"(torch|jax|keras|numpy|npt|np|collections|pathlib)(\..*)?")]

autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "none"  # the docstrings say shapes and dtypes
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_static_path, html_css_files = ["static"], ["site.css"]
html_copy_source = html_show_sourcelink = False

CONTENTS = """
```{toctree}
:hidden:
:caption: Guide

docs/build
docs/operator
docs/numerics
docs/models
docs/transformers
docs/export
docs/parallel
docs/keras
docs/coming-from
docs/environment
examples/article/README
docs/glossary
```

```{toctree}
:hidden:
:caption: API

docs/api/operator
docs/api/nn
docs/api/models
docs/api/hf
docs/api/parallel
docs/api/keras
docs/api/compat
```

```{toctree}
:hidden:
:glob:
:caption: Speed

Overview <docs/benchmarks>
docs/benchmarks/*/*
How they are made <benchmarks/README>
CUDA <docs/cuda>
```

```{toctree}
:hidden:
:caption: Development

CONTRIBUTING
docs/releasing
docs/versions
docs/architecture
csrc/README
tests/ptxcpu/README
CHANGELOG
SECURITY
```
"""


def _complete(app: Sphinx, name: str, source: list[str]) -> None:
    """What a page has in the site alone: the contents, and titles over the benchmarks' tables."""
    if name == root_doc:
        source[0] += CONTENTS
    elif name.startswith("docs/benchmarks/"):
        *_, instruction_set, command = name.split("/")
        source[0] = f"# {command.capitalize()}, {instruction_set}\n\n{source[0]}"


def _by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: Element
) -> Element | None:
    domain, target = env.domains.python_domain, node.get("reftarget", "")
    found = [name for name in domain.objects if name.endswith(f".{target}")]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], found[0], node, text
    )


def setup(app: Sphinx) -> None:
    app.connect("source-read", _complete)
    app.connect("missing-reference", _by_last_name)
