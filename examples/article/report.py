"""What the article's scripts share: their options, their tables and their pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image  # matplotlib needs it too

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the modules of examples/
import cli

__all__ = ["cli", "difference", "parser", "plt", "save", "table"]

plt.rcParams |= {"figure.constrained_layout.use": True, "figure.dpi": 80}


def parser(doc: str | None) -> cli.Parser:
    """A parser with the options of every script; ``doc`` is the script's docstring."""
    parser = cli.parser(doc)
    parser.add_output_folder("--out", default="runs/article", help="folder for the picture")
    return parser


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a Markdown table, its columns aligned: the first left, the others right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("| " + " | ".join((first.ljust(widths[0]), *cells)) + " |")


def difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    """The largest absolute difference, for a table."""
    return f"{(found - expected).abs().max().item():.1e}"


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes the picture as folder/name.png and says so."""
    path = folder / f"{name}.png"
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(64).save(path, optimize=True)  # a palette: a third of the size
    plt.close(figure)
    print(f"\npicture: {path}")
