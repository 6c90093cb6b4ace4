"""How fast torch_rwkv6 is on this machine, beside everything else that computes the same.

python -m benchmarks all --short      what `make bench` runs, in under five minutes
python -m benchmarks COMMAND --help   one of them; see benchmarks/README.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import (
    backward,
    decode,
    gpu,
    keras,
    model,
    op,
    overhead,
    readme,
    report_gpu,
    rivals,
    scaling,
    serve,
    train,
)
from benchmarks.report import instruction_set

# A sub-command is a module with a docstring, add_arguments(parser) and run(args).
MEASURED = {
    "overhead": overhead,
    "op": op,
    "backward": backward,
    "decode": decode,
    "scaling": scaling,
}
COMMANDS = MEASURED | {
    "gpu": gpu,
    "keras": keras,
    "model": model,
    "serve": serve,
    "train": train,
    "report-gpu": report_gpu,
    "rivals": rivals,
    "readme": readme,
}


def thread_counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError
    return counts


def folder(text: str) -> Path:
    return Path(text.replace("{isa}", instruction_set()) if "{isa}" in text else text)


def common_options() -> argparse.ArgumentParser:
    """What every sub-command understands."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--short", action="store_true", help="fewer and smaller shapes, fewer turns"
    )
    parser.add_argument(
        "--seconds", type=float, help="time for each contender and shape (3, with --short 0.3)"
    )
    parser.add_argument(
        "--threads", type=thread_counts, default=[1, 2], help="numbers of threads (1,2)"
    )
    parser.add_argument(
        "--out",
        type=folder,
        default=Path("build/benchmarks"),
        help="folder for NAME.json, NAME.md and NAME.png (%(default)s); {isa} in it stands for "
        "the instruction set of the kernels here, such as avx2",
    )
    parser.add_argument(
        "--rivals",
        type=Path,
        default=Path("build/rivals"),
        help="folder in which contenders from PyPI are installed (%(default)s)",
    )
    return parser


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["all"] and not {"-h", "--help"} & set(arguments):
        for name in MEASURED:
            print(f"\n== {name}", flush=True)
            main([name, *arguments[1:]])
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("all", parents=[common_options()], help="every measurement, in turn")
    for name, module in COMMANDS.items():
        first = (module.__doc__ or "").split("\n")[0]
        command = commands.add_parser(
            name, parents=[common_options()], help=first, description=module.__doc__
        )
        module.add_arguments(command)
    args = parser.parse_args(arguments)
    if args.seconds is None:
        args.seconds = 0.3 if args.short else 3.0
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
