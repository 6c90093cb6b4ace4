"""Builds the extension; everything else about the package is in pyproject.toml.

Two shared libraries: librwkv6.so holds the kernels behind a C interface (csrc/include/rwkv6.h) and
knows no framework; _C.abi3.so registers them with torch and uses only its stable ABI.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

KERNELS = "torch_rwkv6.librwkv6"
ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
SANITIZE = os.environ.get("RWKV6_SANITIZE")  # "address,undefined": see `make sanitize`

COMPILE_ARGS = [
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",  # the same element must get the same bits in every loop
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    f"-ffile-prefix-map={ROOT}=.",
    f"-I{ROOT / 'csrc/include'}",
    f"-I{ROOT / CSRC}",
    *(arg for path in include_paths() for arg in ("-isystem", path)),
]
LINK_ARGS: list[str] = []
if SANITIZE:
    COMPILE_ARGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-g", "-O1"]
    LINK_ARGS += [f"-fsanitize={SANITIZE}"]
else:
    COMPILE_ARGS += ["-g0"]
if sys.platform == "darwin":
    LIBRARY_NAME, BESIDE = "-Wl,-install_name,@rpath/librwkv6.so", "@loader_path"
else:
    LIBRARY_NAME, BESIDE = "-Wl,-soname,librwkv6.so", "$ORIGIN"


class Build(BuildExtension):
    """Names the kernel library librwkv6.so and links the binding against it."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == KERNELS.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # neither is a Python module: they are loaded with dlopen

    def build_extension(self, ext: Extension) -> None:
        if ext.name != KERNELS:
            ext.extra_link_args = [
                *ext.extra_link_args,
                self.get_ext_fullpath(KERNELS),
                f"-Wl,-rpath,{BESIDE}",
            ]
        super().build_extension(ext)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in CSRC.glob(pattern))


def headers() -> list[str]:
    return sources("**/*.h", "**/*.inc")


setup(
    ext_modules=[
        Extension(
            KERNELS,
            sources("*.cpp", "cpu/*.cpp"),
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
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
