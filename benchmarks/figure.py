"""Pictures of the tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Report, number

OURS, OTHERS, LIMITS = "#c44e52", "#8da0b6", "#d9d9d9"


def _pyplot():
    """matplotlib without a screen; None where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _colour(label: str) -> str:
    return OURS if label.startswith("torch_rwkv6") else LIMITS if "limit" in label else OTHERS


def bars(report: Report, folder: Path, key: str = "min_ns", unit: str = "ns") -> None:
    """One panel for each table so far: a bar for each contender, fastest on top, logarithmic."""
    if (pyplot := _pyplot()) is None:
        return
    tables = [t for t in report.tables if any(row.get(key) for row in t.rows)]
    height = max(len(t.rows) for t in tables) * 0.28 + 0.9
    figure, panels = pyplot.subplots(
        len(tables), 1, figsize=(9, height * len(tables)), squeeze=False, layout="constrained"
    )
    for table, axes in zip(tables, panels[:, 0], strict=True):
        rows = sorted((row for row in table.rows if row.get(key)), key=lambda row: -row[key])
        labels, values = [row["contender"] for row in rows], [row[key] for row in rows]
        drawn = axes.barh(labels, values, color=[_colour(label) for label in labels])
        axes.bar_label(drawn, [f" {number(v)}" for v in values], fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2, max(values) * 3)
        axes.set_title(table.title, loc="left", fontsize=10)
        axes.set_xlabel(unit + ", logarithmic", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(_made(folder) / f"{report.name}.png", dpi=110)
    pyplot.close(figure)


def growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and megabytes over the number of tokens, both logarithmic."""
    if (pyplot := _pyplot()) is None:
        return
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("min_ns"):
            row = row | {"seconds": row["min_ns"] * row["B"] * row["T"] * row["H"] / 1e9}
            lines.setdefault(f"{row['contender']}, {row['kind']}", []).append(row)
    panels = {"seconds": "seconds", "peak_mb": "peak memory, MB"}
    if not any(row.get("peak_mb") for row in rows):  # not measured on this system
        del panels["peak_mb"]
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for axes, (key, title) in zip(grid[0], panels.items(), strict=True):
        for label, line in lines.items():
            shown = [row for row in line if row.get(key)]
            style = "-" if label.endswith("backward") else "--"
            axes.plot(
                [row["T"] for row in shown],
                [row[key] for row in shown],
                style,
                marker="o",
                color=_colour(label),
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{title} over tokens", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(_made(path.parent) / path.name, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class Panel:
    """Lines over one axis: for each label the values of both axes."""

    title: str
    lines: dict[str, tuple[list[float], list[float]]]
    marker: str = "o"
    logarithmic: bool = False  # the x axis


def panels(drawn: list[Panel], path: Path) -> None:
    """The panels side by side, their y axes from zero."""
    if (pyplot := _pyplot()) is None:
        return
    figure, grid = pyplot.subplots(
        1, len(drawn), figsize=(4.5 * len(drawn), 3.6), layout="constrained", squeeze=False
    )
    for panel, axes in zip(drawn, grid[0], strict=True):
        for label, (x, y) in panel.lines.items():
            axes.plot(x, y, marker=panel.marker, label=label)
        if panel.logarithmic:
            ticks = sorted({value for x, _ in panel.lines.values() for value in x})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
        axes.set_ylim(bottom=0)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(_made(path.parent) / path.name, dpi=110)
    pyplot.close(figure)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
