"""What the command lines of the examples share.

A script parses its arguments with `parser` and wraps its main in `command`. So wrong arguments are
refused by name before anything expensive begins, and an error that a user can act on is one line.
"""

from __future__ import annotations

import argparse
import errno
import functools
import inspect
import math
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 + SIGINT (Ctrl-C), 128 + SIGTERM
TOKENIZER = "bytes, world or a .json file; by default as the model's vocabulary says"  # a help text
EARLY = "interrupted; what was learnt until then is written"
BROKEN_PIPE = 141  # 128 + SIGPIPE, as of other programs whose reader (`| head`) has gone


class Terminated(KeyboardInterrupt):
    """As Ctrl-C, but SIGTERM."""


class Parser(argparse.ArgumentParser):
    """Raises a ValueError for wrong arguments; checks output paths after all other arguments."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(
            description=(doc or "").partition("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.outputs: list[tuple[str, Callable[[Path], None]]] = []

    def add_output_file(self, flag: str, default: str, help: str) -> None:
        """A file to write. Its folder is made, and writing tried, before there is a result."""
        self._add_output(flag, default, help, try_file)

    def add_output_folder(self, flag: str, default: str, help: str) -> None:
        """A folder to write to. It is made, and writing tried, before there is a result."""
        self._add_output(flag, default, help, try_folder)

    def _add_output(self, flag: str, default: str, help: str, check: Callable[[Path], None]):
        action = self.add_argument(flag, type=path, default=Path(default), help=help)
        self.outputs.append((action.dest, check))

    def parse_args(self, args=None, namespace=None) -> Any:
        parsed = super().parse_args(args, namespace)
        for name, check in self.outputs:
            try:
                check(getattr(parsed, name))
            except OSError as error:
                raise ValueError(f"--{name}: cannot be written: {error}") from error
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser(doc: str | None) -> Parser:
    """A parser that shows the first line of ``doc``, a script's docstring; with --seed."""
    parser = Parser(doc)
    parser.add_argument("--seed", type=seed, default=0, help="of everything random")
    return parser


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: an integer from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, got {text!r}"
            )
        if value > most:
            raise argparse.ArgumentTypeError(f"expected an integer of at most {most}, got {text!r}")
        return value

    return parse


positive = integer(1)
seed = integer(0, 2**32 - 1)  # what NumPy, torch and Lightning all take


def number(
    *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite number > ``above``, >= ``least`` and <= ``most``."""
    bounds = [f"{sign} {x:g}" for sign, x in ((">", above), (">=", least), ("<=", most))]
    bounds = [bound for bound in bounds if not bound.endswith("inf")]
    expected = " ".join(("a finite number", " and ".join(bounds))).strip()

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and above < value and least <= value <= most):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


rate = number(above=0)  # of learning
seconds = number(above=0, most=1e9)
share = number(above=0, most=1)


def path(text: str) -> Path:
    """An argparse type: any path but the empty one, which would be the working directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(text)


def input_file(text: str) -> str:
    """An argparse type: a file that is there and can be read (it may be a pipe, read only once)."""
    file = path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text}")
    if not file.exists():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    if not os.access(file, os.R_OK):
        raise argparse.ArgumentTypeError(f"{text} may not be read")
    return text


def try_folder(folder: Path) -> None:
    """Makes the folder and its parents.

    Raises:
        OSError: that, or writing a file there, is not possible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try_file(folder / f".{os.getpid()}.part")


def try_file(file: Path) -> None:
    """Makes the folder of the file and its parents; a file that is there stays as it is.

    Raises:
        OSError: that, or writing the file, is not possible.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not file.is_file():
        raise OSError(errno.EINVAL, "no file, but a folder or device", str(file))
    existed = file.exists()
    file.open("ab").close()
    if not existed:
        file.unlink()


def command(main: Callable[..., None]) -> Callable[..., int]:
    """A script's main that returns an exit code: 0; 2 for a mistake; 130 or 143 after a signal."""
    script = Path(inspect.unwrap(main).__code__.co_filename).name

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            main(argv)
            sys.stdout.flush()
        except KeyboardInterrupt as interrupt:
            say(script, str(interrupt) or "interrupted")
            return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
        except SystemExit as end:  # of --help; or Lightning's, after a signal
            if end.code is not None and not isinstance(end.__context__, KeyboardInterrupt):
                raise
            say(script, "interrupted")
            return TERMINATED if end.code is None else INTERRUPTED
        except BrokenPipeError:
            # Nobody reads what is still in the buffer: Python must not flush it at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except Exception as error:
            # Not imported before, because examples on JAX and NumPy run without torch.
            from torch_rwkv6.__main__ import MISTAKES

            if not isinstance(error, MISTAKES):
                raise
            say(script, f"error: {str(error) or type(error).__name__}")
            return 2
        return 0

    return run


def say(script: str, message: str) -> None:
    """One line on stderr, of at most some hundred characters."""
    print(f"{script}: {textwrap.shorten(message, 600, placeholder=' ...')}", file=sys.stderr)


@contextmanager
def first_interrupt(stop: Callable[[type[KeyboardInterrupt]], None]) -> Iterator[None]:
    """Within this context the first Ctrl-C or SIGTERM calls ``stop``; a second one interrupts.

    ``stop`` is told which it was, as an exception to be raised.

    Raises:
        KeyboardInterrupt: at a second Ctrl-C.
    """
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    before = {number: signal.getsignal(number) for number in kinds}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: object) -> None:
        restore()
        stop(kinds[signal.Signals(number)])

    for number in kinds:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def _interrupted_early(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ctrl-C while the script is still importing: one line, as later."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    say(Path(sys.argv[0]).name, "interrupted")
    sys.exit(INTERRUPTED)


sys.excepthook = _interrupted_early
