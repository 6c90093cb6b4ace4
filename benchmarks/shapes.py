"""The --shape option."""

from __future__ import annotations

import argparse

Shape = tuple[int, int, int, int]  # B, T, H, N


def add_shape_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="B,T,H,N",
        help="in place of the shapes measured by default; may be repeated",
    )


def _shape(text: str) -> Shape:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError
    return sizes
