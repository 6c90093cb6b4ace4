"""Builds the extension; everything else about the package is in pyproject.toml.

Three shared libraries: librwkv6.so holds the kernels behind a C interface (csrc/include/rwkv6.h)
and knows no framework; _C.abi3.so registers them with torch and uses only its stable ABI;
_xla.abi3.so offers them to XLA, for JAX and TensorFlow, and is built where jaxlib's headers are.
librwkv6.so has CUDA kernels where nvcc is found (csrc/cuda/nvcc.py); torch may be a CPU build.
On Linux what the libraries need of the system is kept old (csrc/linux/).
What is compiled stays in build/, so that the next build compiles only what has changed.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import (
    BuildExtension,
    get_cxx_compiler,
    include_paths,
    library_paths,
)

KERNELS = "torch_rwkv6.librwkv6"
ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
sys.path.insert(0, str(ROOT / CSRC / "cuda"))
import nvcc  # noqa: E402

SANITIZE = os.environ.get("RWKV6_SANITIZE")  # "address,undefined": see `make sanitize`

HOST_ARGS = ["-fvisibility=hidden", "-Wall", "-Wextra", f"-ffile-prefix-map={ROOT}=."]
INCLUDE_ARGS = [
    f"-I{ROOT / 'csrc/include'}",
    f"-I{ROOT / CSRC}",
    *(arg for path in include_paths() for arg in ("-isystem", path)),
]
COMPILE_ARGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",  # the same element must get the same bits in every loop
    *HOST_ARGS,
    *INCLUDE_ARGS,
]
LINK_ARGS: list[str] = []
if SANITIZE:
    COMPILE_ARGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-g1", "-O1"]
    LINK_ARGS += [f"-fsanitize={SANITIZE}"]
else:
    COMPILE_ARGS += ["-g0"]
if sys.platform == "darwin":
    LIBRARY_NAME, BESIDE = "-Wl,-install_name,@rpath/librwkv6.so", "@loader_path"
else:
    LIBRARY_NAME, BESIDE = "-Wl,-soname,librwkv6.so", "$ORIGIN"
OLDER_LIBRARIES: list[str] = []  # defined by us, as older systems' libraries do not have it
if sys.platform == "linux":
    OLDER_LIBRARIES += [str(CSRC / "linux/older_libraries.cpp")]
    LINK_ARGS += [f"-Wl,--version-script={ROOT / CSRC / 'linux/exports.map'}"]


def xla_headers() -> Path | None:
    """The folder of XLA's FFI headers: RWKV6_XLA names it, or it comes with jaxlib.

    RWKV6_XLA=1 makes their absence an error, RWKV6_XLA=0 leaves the XLA binding out. A binding
    built with the headers of one jaxlib runs with every later one, and not with earlier ones.
    """
    wanted = os.environ.get("RWKV6_XLA", "")
    if wanted == "0":
        return None
    spec = importlib.util.find_spec("jaxlib")
    folder = Path(spec.origin).with_name("include") if spec and spec.origin else Path("jaxlib")
    if wanted not in ("", "1"):
        folder = Path(wanted).resolve()
    if (folder / "xla/ffi/api/ffi.h").exists():
        return folder
    if wanted:
        raise SystemExit(
            f"RWKV6_XLA={wanted}: expected 0, 1 or a folder with xla/ffi/api/ffi.h, which comes "
            f"with jaxlib; there is none in {folder}"
        )
    return None


XLA_HEADERS = xla_headers()


def nvcc_options() -> list[str]:
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or nvcc.DEFAULT_ARCHITECTURES
    host = [arg for flag in ("-fPIC", *HOST_ARGS) for arg in ("-Xcompiler", flag)]
    return ["-std=c++20", "-O3", *nvcc.architecture_options(names), *host, *INCLUDE_ARGS]


def cuda_toolkit(folder: Path) -> tuple[nvcc.Toolkit, list[str]] | None:
    """An nvcc that compiles, tried in folder, and its options, where there is one.

    RWKV6_CUDA=1 makes it an error that there is none; RWKV6_CUDA=0 leaves the CUDA kernels out.
    """
    wanted = os.environ.get("RWKV6_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"RWKV6_CUDA={wanted}: expected 0 or 1")
    if wanted == "0":
        return None
    try:
        if toolkit := nvcc.toolkit():
            options = nvcc_options()
            toolkit.check(options, folder)
            return toolkit, options
        if wanted == "1":
            raise nvcc.UnusableError("no nvcc in CUDA_HOME, PATH, /usr/local/cuda or from PyPI")
    except nvcc.UnusableError as problem:
        if wanted == "1":
            raise SystemExit(f"RWKV6_CUDA=1: {problem}") from None
        print(f"torch_rwkv6: built without CUDA kernels. {problem}", file=sys.stderr)
    return None


def link_for_older_glibc(compiler: Any) -> None:
    """With RWKV6_GLIBC=2.28, or another version, has zig link what g++ compiles for that glibc.

    Zig, of the PyPI package ziglang, knows the symbols of every glibc and takes those of the wanted
    one instead of this system's. The C++ library stays that of g++.
    """
    glibc = os.environ.get("RWKV6_GLIBC")
    if not glibc:
        return
    if sys.platform != "linux" or not importlib.util.find_spec("ziglang"):
        raise SystemExit(f"RWKV6_GLIBC={glibc}: needs Linux and the PyPI package ziglang")
    machine = sysconfig.get_platform().removeprefix("linux-")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{glibc}"]
    compiler.compiler_cxx = zig  # which only links: torch compiles with get_cxx_compiler()
    gxx = shlex.split(get_cxx_compiler())
    find = [[*gxx, f"-print-file-name={name}"] for name in ("libstdc++.so.6", "libgcc_s.so.1")]
    paths = [subprocess.check_output(command, text=True).strip() for command in find]
    compiler.set_link_objects(paths)


class Build(BuildExtension):
    """Names the kernel library librwkv6.so, adds its CUDA part and links the bindings to it."""

    def finalize_options(self) -> None:
        self.build_temp = "build/objects"  # not pip's temporary folder: ninja finds what is there
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == KERNELS.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # neither is a Python module: they are loaded with dlopen

    def compile(self, ext: Extension) -> None:
        """Compiles and does not link: build_extension then finds the objects up to date."""
        self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            debug=self.debug,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )

    def add_cuda(self, ext: Extension) -> None:
        """nvcc compiles the CUDA kernels while the C++ compiler is at everything else."""
        folder = ROOT / "build/cuda"
        found = cuda_toolkit(folder)
        if not found:
            ext.sources += sources("cuda/absent.cpp")
            return
        toolkit, options = found
        with ThreadPoolExecutor(1) as beside:
            objects = beside.submit(toolkit.compile, sources("cuda/*.cu"), options, folder)
            for each in self.extensions:
                self.compile(each)
        ext.extra_objects += objects.result()
        ext.library_dirs.append(str(toolkit.libraries))
        ext.libraries += ["cudart_static", "dl", "pthread", "rt"]

    def build_extension(self, ext: Extension) -> None:
        link_for_older_glibc(self.compiler)
        if ext.name == KERNELS:
            self.add_cuda(ext)
        else:
            older = [Path(self.build_temp, name).with_suffix(".o") for name in OLDER_LIBRARIES]
            ext.extra_objects += map(str, older)  # compiled with the kernel library
            kernels_folder = os.path.relpath("torch_rwkv6", ext.name.split(".")[0])
            ext.extra_link_args = [
                *ext.extra_link_args,
                self.get_ext_fullpath(KERNELS),
                f"-Wl,-rpath,{BESIDE}/{kernels_folder}",
            ]
        super().build_extension(ext)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in CSRC.glob(pattern))


def cpu_sources() -> list[str]:
    """The CPU's half of the kernel library.

    RWKV6_BUILD_ISA=native leaves out the wider instruction sets but the best one of this CPU: such
    a build takes less time, and runs everywhere.
    """
    wanted = os.environ.get("RWKV6_BUILD_ISA", "")
    if wanted not in ("", "native"):
        raise SystemExit(f"RWKV6_BUILD_ISA={wanted}: expected native or nothing")
    left_out = {"avx2", "avx512"} if wanted else set()
    left_out.discard(torch.backends.cpu.get_cpu_capability().lower())
    return [
        name
        for name in sources("*.cpp", "cpu/*.cpp")
        if Path(name).stem.removeprefix("isa_") not in left_out
    ]


def headers() -> list[str]:
    return sources("**/*.h", "**/*.cuh", "**/*.inc")


setup(
    ext_modules=[
        Extension(
            KERNELS,
            cpu_sources() + OLDER_LIBRARIES,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=[*LINK_ARGS, LIBRARY_NAME],
            depends=headers(),
            language="c++",
        ),
        Extension(
            "torch_rwkv6._C",
            sources("bindings/torch.cpp"),
            library_dirs=library_paths(),
            libraries=["c10", "torch", "torch_cpu"],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            depends=headers(),
            language="c++",
            py_limited_api=True,
        ),
        *(
            [
                Extension(
                    "keras_adapter._xla",
                    sources("bindings/xla.cpp"),
                    extra_compile_args=[*COMPILE_ARGS, "-isystem", str(XLA_HEADERS)],
                    extra_link_args=LINK_ARGS,
                    depends=headers(),
                    language="c++",
                    py_limited_api=True,
                )
            ]
            if XLA_HEADERS
            else []
        ),
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
