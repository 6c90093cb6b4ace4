"""Installs the contenders that come from PyPI, each into a folder of its own (--rivals)."""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.contenders import REQUIREMENTS, SLOW


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default, slow = (", ".join(x for x in REQUIREMENTS if (x in SLOW) == s) for s in (False, True))
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{default} by default; {slow} compiles for long"
    )


def run(args: argparse.Namespace) -> None:
    unknown = set(args.names) - set(REQUIREMENTS)
    if unknown:
        sys.exit(f"rivals: {', '.join(unknown)}: expected some of {', '.join(REQUIREMENTS)}")
    failed = []
    for name in args.names or [name for name in REQUIREMENTS if name not in SLOW]:
        folder = args.rivals / name
        if folder.exists():
            print(f"{name}: already in {folder} (delete it to install again)")
            continue
        print(f"{name}: {REQUIREMENTS[name]} into {folder}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        if subprocess.run([*command, *REQUIREMENTS[name].split()]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"rivals: pip could not install {', '.join(failed)}; the others can be raced")
