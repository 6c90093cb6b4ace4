"""Builds what the tests of CUDA kernels need, into build/ptxcpu, whenever a source has changed.

Everything is built once: concurrent test processes wait for the first that wants it.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build/ptxcpu"
NVCC_MISSING = (
    "nvcc was not found: looked in CUDA_HOME/bin, PATH, /usr/local/cuda/bin and where the PyPI "
    "packages nvidia-cuda-nvcc, nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-nvvm put it"
)


@functools.cache
def find_tool(name: str) -> Path | None:
    """A program of the CUDA toolkit: nvcc, nvdisasm, cuobjdump, cu++filt."""
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    folders += map(Path, os.environ.get("PATH", "").split(os.pathsep))
    folders += [Path("/usr/local/cuda/bin")]
    folders += [Path(site) / "nvidia/cu13/bin" for site in sys.path]
    if name != "nvcc" and find_nvcc():
        folders.insert(0, toolkit() / "bin")
    found = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    return Path(found) if found else None


def find_nvcc() -> Path | None:
    return find_tool("nvcc")


def tool(name: str) -> Path:
    """find_tool, or an error that says where it was looked for."""
    path = find_tool(name)
    if path is None:
        raise FileNotFoundError(NVCC_MISSING.replace("nvcc", name, 1))
    return path


@functools.cache
def toolkit() -> Path:
    """The toolkit's folder as nvcc names it: nvcc on the PATH may be a script or a link."""
    plan = run([tool("nvcc"), "--dryrun", "-x", "cu", "/dev/null"]).stderr
    top = next(line for line in plan.splitlines() if line.startswith("#$ TOP="))
    return Path(top.split("=", 1)[1]).resolve()


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs a program and returns what it wrote; its complaints become the error's message."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        line = " ".join(map(str, command))
        raise RuntimeError(f"{line}\nfailed:\n{result.stdout}{result.stderr}")
    return result


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(
    name: str,
    command: Sequence[str | Path],
    depends: Iterable[Path],
    make: Callable[[Path], object],
) -> Path:
    """A folder that make(folder) has filled, kept until command or a file of depends changes."""
    contents = hashlib.sha256()
    for path in sorted(depends):
        contents.update(path.read_bytes())
    name += "-" + hashlib.sha256("\0".join(map(str, command)).encode()).hexdigest()[:8]
    folder = CACHE / f"{name}-{contents.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{name}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE, ignore_cleanup_errors=True) as unfinished:
                make(Path(unfinished))
                for old in CACHE.glob(f"{name}-*"):
                    shutil.rmtree(old)
                Path(unfinished).rename(folder)  # whole or not at all
    return folder


@functools.cache
def _cpu() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in cpuinfo if line.startswith(("flags", "Features"))), "")


@functools.cache
def library() -> Path:
    """The folder of libptxcpu.so and of the stand-in libcudart.so.13."""
    source = HERE / "src"
    headers, exports = sorted(source.glob("*.h")), source / "cudart.map"
    # What takes time is compiling: of -O2, vectors alone are worth theirs.
    flags = ["-std=c++20", "-O1", "-ftree-vectorize", "-fvect-cost-model=very-cheap"]
    flags += ["-march=native", "-ffp-contract=off", "-fPIC", "-fno-semantic-interposition"]
    flags += [f"-I{toolkit() / 'include'}"]

    def compiled(name: str, options: Sequence[str | Path], file: Path, output: str) -> Path:
        command = ["g++", *flags, *options, file]
        folder = cached(
            name,
            [*command, _cpu()],
            [file, *headers],
            lambda to: run([*command, "-o", to / output]),
        )
        return folder / output

    # Half of most files' time would go into reading the headers. Told to include statement.h, g++
    # takes what it has made of it before: statement.h.gch in an earlier folder.
    header = source / "statement.h"
    made = compiled("header", ["-x", "c++-header"], header, "statement.h.gch")
    include = [f"-I{made.parent}", f"-I{source}", "-include", "statement.h"]

    def object_file(file: Path) -> Path:
        return compiled(f"object-{file.stem}", [*include, "-c"], file, "object.o")

    files = sorted(source.glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip([file.stem for file in files], pool.map(object_file, files)))
    interpreter = [path for name, path in objects.items() if name != "cudart"]
    runtime = [path for name, path in objects.items() if name != "interface"]

    def link(folder: Path) -> None:
        run(["g++", "-shared", *interpreter, "-o", folder / "libptxcpu.so"])
        script = f"-Wl,--version-script={exports},-soname,libptxcpu-cudart.so"
        run(["g++", "-shared", *runtime, script, "-o", folder / "libcudart.so.13"])
        (folder / "libcudart.so").symlink_to("libcudart.so.13")

    return cached("library", ["g++"], [exports, *objects.values()], link)


def ptx(source: Path, arch: str = "80", flags: Sequence[str] = ()) -> str:
    """nvcc's PTX of a .cu file for compute_<arch>."""
    command = [tool("nvcc"), "-std=c++17", "-O3", "-ptx", f"-arch=compute_{arch}", *flags, source]
    name = f"{source.stem}-{arch}"
    folder = cached(name, command, [source], lambda to: run([*command, "-o", to / "ptx"]))
    return (folder / "ptx").read_text()


def cuda_library(
    name: str,
    sources: Sequence[Path],
    arch: Sequence[str] = ("80",),
    flags: Sequence[str | Path] = (),
    depends: Iterable[Path] = (),
) -> Path:
    """A shared library of .cu and .cpp files whose kernels run on the CPU: it carries their PTX
    for each of arch and is linked with the stand-in libcudart.so.13.

    depends: what else the library is made of, headers above all.
    """
    command: list[str | Path] = [tool("nvcc"), "-std=c++17", "-O3", "--no-compress", *flags]
    command += [f"-gencode=arch=compute_{one},code=compute_{one}" for one in arch]
    command += ["-Xcompiler=-fPIC", "-shared", "--cudart=shared", "--cudadevrt=none"]
    command += [f"-L{library()}", *sources]
    file = f"lib{name}.so"
    folder = cached(
        name, command, [*sources, *depends], lambda to: run([*command, "-o", to / file])
    )
    return folder / file
