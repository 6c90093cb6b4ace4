"""Finds nvcc and compiles the CUDA kernels with it, through ninja.

torch's own extension builder does that only on a CUDA build of torch, and only with the CUDA
version that torch was built with. The kernels use nothing of torch, so neither matters here.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# The PTX of 10.0 is for 10.3 and 11.0, that of 12.0 for what comes after it.
DEFAULT_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0+PTX 12.0+PTX"
OLDEST_ARCHITECTURE = (8, 0)  # has bfloat16 tensor cores and cp.async

PROBE = "#include <cuda_runtime_api.h>\n__global__ void probe() {}\n"


class UnusableError(Exception):
    """nvcc is there, but cannot compile for us; says why."""


def _places() -> Iterable[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable], "bin")
    yield from map(Path, os.environ.get("PATH", "").split(os.pathsep))
    yield Path("/usr/local/cuda/bin")
    # the PyPI packages nvidia-cuda-nvcc and its like
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        yield from sorted(Path(folder).glob("cu[0-9]*/bin"), reverse=True)


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path

    @functools.cached_property
    def home(self) -> Path:
        """The toolkit's folder as nvcc names it: what is on PATH may be a link or a script."""
        plan = [str(self.nvcc), "--dryrun", "-x", "cu", os.devnull]
        lines = subprocess.run(plan, capture_output=True, text=True).stderr.splitlines()
        tops = [line.split("=", 1)[1] for line in lines if line.startswith("#$ TOP=")]
        if not tops:
            raise UnusableError(f"{self.nvcc} does not say where its toolkit is")
        return Path(tops[0]).resolve()

    @property
    def libraries(self) -> Path:
        """The folder of libcudart_static.a."""
        folders = [self.home / name for name in ("lib64", "lib")]
        found = [folder for folder in folders if (folder / "libcudart_static.a").exists()]
        if not found:
            raise UnusableError(f"no libcudart_static.a in {folders[0]} or {folders[1]}")
        return found[0]

    def check(self, options: Sequence[str], folder: Path) -> None:
        """Compiles next to nothing. Raises UnusableError."""
        _ = self.libraries
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "probe.cu").write_text(PROBE)
        command = [self.nvcc, *options, "-c", "probe.cu", "-o", "probe.o"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            raise UnusableError(f"{command[0]} says: {(result.stderr or result.stdout).strip()}")

    def compile(self, sources: Sequence[str], options: Sequence[str], folder: Path) -> list[str]:
        """Compiles what has changed, MAX_JOBS files at a time. Returns the object files."""
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted(sources, key=os.path.getsize, reverse=True)  # the longest take most time
        objects = [str(folder / f"{Path(source).name}.o") for source in sources]

        def path(text: str | Path) -> str:
            return re.sub(r"([$ :])", r"$\1", str(Path(text).resolve()))

        nvcc = shlex.join([str(self.nvcc), *options]).replace("$", "$$")
        rules = [
            "rule nvcc",
            f"  command = {nvcc} -MD -MF $out.d -c $in -o $out",
            "  description = nvcc $in",
            "  depfile = $out.d",
            "  deps = gcc",
            *(f"build {path(o)}: nvcc {path(s)}" for o, s in zip(objects, sources, strict=True)),
        ]
        (folder / "nvcc.ninja").write_text("\n".join(rules) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [sys.executable, "-m", "ninja", "-f", "nvcc.ninja"]
        subprocess.run(command + (["-j", jobs] if jobs else []), cwd=folder, check=True)
        return objects


def toolkit() -> Toolkit | None:
    """Of the first nvcc in CUDA_HOME, PATH, /usr/local/cuda and PyPI's packages."""
    found = (folder / "nvcc" for folder in _places() if (folder / "nvcc").is_file())
    return next(map(Toolkit, found), None)


def architecture_options(names: str) -> list[str]:
    """nvcc's options for names such as "8.0 9.0+PTX", separated by spaces or semicolons."""
    options, too_old = [], []
    for name in re.split(r"[\s;]+", names.strip()):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not parts:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 8.0 or 9.0+PTX, "
                f"separated by spaces or semicolons, got {name!r}"
            )
        major, minor, variant, ptx = parts.groups()
        if (int(major), int(minor)) < OLDEST_ARCHITECTURE:
            too_old.append(name)
            continue
        number = f"{major}{minor}{variant}"
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if ptx:
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    if too_old:
        print(f"torch_rwkv6: no CUDA kernels for {', '.join(too_old)}: they need 8.0 or later")
    if not options:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: the CUDA kernels need 8.0 or later, got {names}")
    return options
