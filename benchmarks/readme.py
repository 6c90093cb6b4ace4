"""Puts the tables of docs/benchmarks into README.md and docs/benchmarks.md, between their markers.

docs/benchmarks has a folder for each instruction set that was measured. Between a marker and the
next `<!-- end -->` goes what the marker stands for:

    <!-- benchmark NAME INDEX: COLUMNS; COLUMNS -->
        table INDEX of NAME.json: of each machine the columns before the semicolon, once those after
    <!-- benchmark NAME INDEX -->       the whole table of each machine
    <!-- benchmark NAME about -->       what was measured on each machine, in words
    <!-- benchmark NAME picture -->     NAME.png of each machine
    <!-- benchmark NAME machines -->    the machines, versions and dates, and links to all pages
    <!-- benchmark NAME processors -->  the processors and dates alone
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MARKER = re.compile(
    r"(?P<start><!-- benchmark (?P<name>\w+) (?P<part>\w+)(: (?P<columns>[^>]+))? -->\n)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)
PAGES = [Path("README.md"), Path("docs/benchmarks.md")]
LABELS = {"avx2": "AVX2", "avx512": "AVX-512", "neon": "NEON", "baseline": "SSE2"}  # of folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(out=Path("docs/benchmarks"))
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="files with markers")


def run(args: argparse.Namespace) -> None:
    for page in args.pages:

        def fill(marker: re.Match[str], page: Path = page) -> str:
            text = _text(args.out, page, marker["name"], marker["part"], marker["columns"])
            return f"{marker['start']}{text}\n{marker['end']}"

        text, count = MARKER.subn(fill, page.read_text("utf-8"))
        page.write_text(text, "utf-8")
        print(f"{page}: {count} markers")


def _text(folder: Path, page: Path, name: str, part: str, columns: str | None) -> str:
    """What a marker of the page stands for."""
    paths = {LABELS[isa]: folder / isa / f"{name}.json" for isa in LABELS}
    found = {
        label: json.loads(path.read_text("utf-8")) for label, path in paths.items() if path.exists()
    }
    if not found:
        sys.exit(
            f"readme: there is no {folder}/*/{name}.json: "
            f"run python -m benchmarks {name} --out '{folder}/{{isa}}'"
        )
    if part == "picture":
        lines = (
            f"![{name}, {label}]({os.path.relpath(paths[label].with_suffix('.png'), page.parent)})"
            for label in found
        )
    elif part == "about":
        lines = (f"- {label}: {c['about']}" for label, c in found.items())
    elif part == "machines":
        lines = (
            f"- {label}: {c['machine']}; {', '.join(c['versions'])}; {c['date']}. Every table: "
            f"{_links(paths[label].parent, page)}"
            for label, c in found.items()
        )
    elif part == "processors":  # what a machine's line begins with
        lines = (
            f"- {label}: {', '.join(c['machine'].split(', ')[:2])}, {c['date']}"
            for label, c in found.items()
        )
    elif part.isdigit() and all(int(part) < len(c["tables"]) for c in found.values()):
        tables = {label: c["tables"][int(part)]["markdown"] for label, c in found.items()}
        if columns is not None:
            each, _, once = columns.partition(";")
            return "\n".join(_merged(tables, _names(each), _names(once)))
        lines = (f"{label}:\n\n{table}\n" for label, table in tables.items())
    else:
        sys.exit(f"readme: {folder}/*/{name}.json has no table {part}")
    return "\n".join(lines).rstrip("\n")


def _links(folder: Path, page: Path) -> str:
    return ", ".join(
        f"[{path.stem}]({os.path.relpath(path, page.parent)})"
        for path in sorted(folder.glob("*.md"))
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _merged(tables: dict[str, str], each: list[str], once: list[str]) -> Iterator[str]:
    """The lines of one table: the columns `each` of every table, `once` of the first with that row.

    What stands left of the columns `each` names a row.
    """
    rows: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    names: list[str] = []
    for label, table in tables.items():
        heading, _, *body = map(_cells, table.split("\n"))
        for column in (*each, *once):
            if column not in heading:
                sys.exit(f"readme: the table {heading[0]!r}, {label}, has no column {column!r}")
        named = min(map(heading.index, each))
        if names and names != heading[:named]:
            sys.exit(f"readme: {names[0]!r} and {heading[0]!r}, {label}, are not the same table")
        names = heading[:named]
        for row in body:
            cells = dict(zip(heading, row, strict=True))
            merged = rows.setdefault(tuple(row[:named]), {})
            merged |= {(label, column): cells[column] for column in each}
            for column in once:
                if merged.get(("", column), "-") == "-":
                    merged["", column] = cells[column]
    columns = [(label, column) for label in tables for column in each]
    columns += [("", column) for column in once]
    headings = [
        f"{label}: {column}" if label and column == each[0] else column for label, column in columns
    ]
    for line in (
        names + headings,
        ["---"] * len(names) + ["---:"] * len(columns),
        *([*row, *(cells.get(c, "-") for c in columns)] for row, cells in rows.items()),
    ):
        yield "| " + " | ".join(line) + " |"
