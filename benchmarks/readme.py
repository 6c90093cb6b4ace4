"""Puts the tables of docs/benchmarks into README.md and docs/benchmarks.md, between their markers.

A marker is `<!-- benchmark NAME INDEX -->`: table INDEX of docs/benchmarks/NAME.json goes between
it and the next `<!-- end -->`; `<!-- benchmark NAME machine -->` is where it was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

MARKER = re.compile(r"(<!-- benchmark (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = [Path("README.md"), Path("docs/benchmarks.md")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(out=Path("docs/benchmarks"))
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="files with markers")


def run(args: argparse.Namespace) -> None:
    def fill(match: re.Match[str]) -> str:
        start, name, part, end = match.groups()
        source = args.out / f"{name}.json"
        if not source.exists():
            sys.exit(f"readme: {source} does not exist: run python -m benchmarks {name} --out ...")
        content = json.loads(source.read_text("utf-8"))
        if part == "machine":
            text = f"{content['machine']}; {', '.join(content['versions'])}"
        elif part.isdigit() and int(part) < len(content["tables"]):
            text = content["tables"][int(part)]["markdown"]
        else:
            sys.exit(f"readme: {source} has no table {part}")
        return f"{start}{text}\n{end}"

    for page in args.pages:
        text, count = MARKER.subn(fill, page.read_text("utf-8"))
        page.write_text(text, "utf-8")
        print(f"{page}: {count} tables")
