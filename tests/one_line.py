"""How scripts refuse what they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def assert_refused(
    main: Callable[[list[str]], int],
    script: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """main ends with exit code 2 and one line on stderr; returns what it wrote to stdout."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.err.endswith("\n")
    assert line.startswith(f"{script}: error: ")
    assert message in line
    return captured.out
