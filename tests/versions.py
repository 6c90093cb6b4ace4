"""The package with the oldest and the newest of what it works with: `make test-versions`.

Each combination gets an environment of its own, one after the other, with the wheel and what is
named here, and runs its tests from an empty directory. The results are kept as a table in
docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent.resolve()
TABLE = TESTS.parent / "docs/versions.md"
TITLE = """# Versions that were tested

Written by `make test-versions`: each line is an environment of its own with the wheel, the versions
named, and whatever pip takes for the rest. `make test-versions ONLY="torch-2.10 jax-oldest"` runs
some of them.

| | versions | tests | on |
|---|---|---|---|
"""

OPERATOR = ("test_forward.py", "test_update.py", "test_errors.py", "test_opcheck.py")
PROCESSES = ("test_parallel.py", "test_parallelize.py", "test_sharded.py", "test_training.py")
TRAINING = ("lightning", "peft", "datasets", "matplotlib")  # packages
ADAPTER = ("adapter/test_wkv.py", "adapter/test_operator.py")


@dataclass(frozen=True)
class Combination:
    packages: tuple[str, ...]  # as pip takes them; their versions are in the table
    tests: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def torch(version: str) -> Combination:
    return Combination((f"torch{version}", *TRAINING), (*OPERATOR, *PROCESSES))


def adapter(backend: str, *packages: str) -> Combination:
    options = (f"--confcutdir={TESTS / 'adapter'}",)
    return Combination(packages, ADAPTER, options, {"KERAS_BACKEND": backend, "OPS_KERNEL": "0"})


def transformers(version: str) -> Combination:
    packages = (f"transformers{version}", "accelerate", "rwkv", "safetensors")
    return Combination(packages, ("test_hf.py",))


COMBINATIONS = {
    "torch-2.10": torch("==2.10.*"),
    "torch-2.13": torch("==2.13.*"),
    "torch-newest": torch(""),
    "jax-oldest": adapter("jax", "jax==0.5.3", "keras"),
    "jax-newest": adapter("jax", "jax", "keras"),
    "keras-oldest": adapter("torch", "keras==3.12.0"),
    "keras-newest": adapter("torch", "keras"),
    "tensorflow-newest": adapter("tensorflow", "tensorflow", "keras"),
    "transformers-oldest": transformers("==5.6.0"),
    "transformers-newest": transformers(""),
}


def run(combination: Combination, wheel: Path, folder: Path) -> tuple[str, str]:
    """The versions that were installed, and the last line that pytest or pip says."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder / "env", with_pip=True)
    empty = folder / "empty"
    empty.mkdir()
    python = str(folder / "env/bin/python")
    install = [python, "-m", "pip", "install", "-q", "--no-compile", str(wheel), "pytest"]
    installed = subprocess.run([*install, *combination.packages], capture_output=True, text=True)
    names = [re.split(r"[=<>]", package)[0] for package in combination.packages]
    if installed.returncode:
        return " ".join(names), installed.stderr.strip().splitlines()[-1]
    show = "import sys; from importlib.metadata import version as v; "
    show += "print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    wanted = list(dict.fromkeys(["torch", *names]))
    versions = subprocess.check_output([python, "-c", show, *wanted], text=True).strip()
    tests = [str(TESTS / name) for name in combination.tests]
    options = ["-q", "-p", "no:cacheprovider", *combination.options]
    # not the checkout's package, which PYTHONPATH might name
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    tested = subprocess.run(
        [python, "-m", "pytest", *options, *tests],
        capture_output=True,
        text=True,
        cwd=empty,
        env=environment | {"OMP_NUM_THREADS": "1"} | combination.environment,
    )
    (folder / "log").write_text(tested.stdout + tested.stderr)
    lines = tested.stdout.strip().splitlines() or tested.stderr.strip().splitlines()
    outcome = re.sub(r" in [\d.]+s.*|=+ ?", "", lines[-1])
    return versions, outcome if tested.returncode == 0 else f"**failed**: {outcome}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("only", nargs="*", help=", ".join(COMBINATIONS))
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(COMBINATIONS):
        parser.error(f"only: expected of {', '.join(COMBINATIONS)}, got {', '.join(unknown)}")
    rows = {}
    if TABLE.exists():
        rows = dict(re.findall(r"^\| ([\w.-]+) (\|.*)$", TABLE.read_text(), re.M))
    failed = False
    for name in arguments.only or COMBINATIONS:
        folder = Path("build/versions", name).resolve()
        versions, outcome = run(COMBINATIONS[name], arguments.wheel.resolve(), folder)
        print(f"{name}: {versions}: {outcome}", flush=True)
        failed |= " passed" not in outcome or "failed" in outcome
        rows[name] = f"| {versions} | {outcome} | {datetime.date.today()} |"
        ordered = [f"| {each} {rows[each]}\n" for each in COMBINATIONS if each in rows]
        TABLE.write_text(TITLE + "".join(ordered))
        shutil.rmtree(folder / "env")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
