"""Figures on screen, as Markdown and as JSON."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

import torch_rwkv6


def machine_line() -> str:
    """CPU, cores, instruction set and versions."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    return (
        f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torch_rwkv6 {torch_rwkv6.__version__}"
    )


def instruction_set() -> str:
    """That of torch_rwkv6's kernels on this CPU: `avx512`, `avx2` and so on."""
    ask = ctypes.CDLL(str(Path(torch_rwkv6.__file__).with_name("librwkv6.so"))).rwkv6_cpu_isa
    ask.restype = ctypes.c_char_p
    return ask().decode()


@dataclass(frozen=True)
class Column:
    key: str
    heading: str
    show: Callable[[Any], str] = str
    left: bool = False


def number(value: float) -> str:
    """About three digits, thousands apart."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def times(value: float) -> str:
    return f"{number(value)}x"


def plural(count: int, thing: str) -> str:
    return f"{count} {thing}" + "s" * (count != 1)


def short_error(value: float) -> str:
    return f"{value:.1e}"


RACE_COLUMNS = (
    Column("contender", "", left=True),
    Column("min_ns", "ns min", number),
    Column("median_ns", "median", number),
    Column("ratio", "to ours", times),
    Column("gb_per_s", "GB/s", number),
    Column("error", "error", short_error),
    Column("extreme_error", "extreme w", short_error),
    Column("note", "", left=True),
)


@dataclass
class Table:
    """Rows are dictionaries; a key that a row lacks, or None, is shown as a dash."""

    title: str
    columns: Sequence[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def _cells(self) -> list[list[str]]:
        def cell(row: dict[str, Any], column: Column) -> str:
            value = row.get(column.key)
            if value is None:
                return "-"
            return column.show(value)

        return [[c.heading for c in self.columns]] + [
            [cell(row, c) for c in self.columns] for row in self.rows
        ]

    def text(self) -> str:
        """Aligned, for a screen."""
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [self.title]
        for row in cells:
            parts = (
                f"{value:{'<' if c.left else '>'}{width}}"
                for value, width, c in zip(row, widths, self.columns, strict=True)
            )
            lines.append("  ".join(parts).rstrip())
        return "\n".join(lines)

    def markdown(self) -> str:
        """As a table whose first heading is the title; columns without any value are left out."""
        heading, *body = self._cells()
        used = [i for i in range(len(heading)) if any(row[i] not in ("", "-") for row in body)]
        lines = [[self.title if i == 0 else heading[i] for i in used]]
        lines.append(["---" if self.columns[i].left else "---:" for i in used])
        lines += [[row[i] for i in used] for row in body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass
class Report:
    """What one sub-command found."""

    name: str
    about: str  # what the numbers are, one line
    tables: list[Table] = field(default_factory=list)
    machine: str = field(default_factory=machine_line)
    date: str = field(default_factory=lambda: date.today().isoformat())

    def add(self, table: Table) -> None:
        print(f"\n{table.text()}", flush=True)
        self.tables.append(table)

    def versions(self) -> list[str]:
        """Of the contenders that took part."""
        found = {row.get("version", "") for table in self.tables for row in table.rows}
        return sorted(found - {""})

    def save(self, folder: Path) -> None:
        """NAME.json with everything and NAME.md with the tables."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "command": self.name,
            "about": self.about,
            "date": self.date,
            "machine": self.machine,
            "versions": self.versions(),
            "tables": [
                {"title": t.title, "rows": t.rows, "markdown": t.markdown()} for t in self.tables
            ],
        }
        (folder / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        parts = [self.about, f"{self.machine}, {self.date}", "; ".join(self.versions())]
        parts += [table.markdown() for table in self.tables]
        (folder / f"{self.name}.md").write_text("\n\n".join(filter(None, parts)) + "\n")
        print(f"\nwritten: {folder / self.name}.json, .md, .png", flush=True)
