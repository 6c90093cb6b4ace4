"""What the command lines of the examples share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the first line of ``doc``, a script's docstring; with --seed."""
    parser = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def run(main: Callable[[], None]) -> None:
    """Calls main; what a user can put right becomes one line on stderr and exit code 2."""
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        message = str(error).partition("\n")[0]
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)
