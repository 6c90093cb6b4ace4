"""Builds the extension; everything else about the package is in pyproject.toml.

Three shared libraries: librwkv6.so holds the kernels behind a C interface (csrc/include/rwkv6.h)
and knows no framework; _C.abi3.so registers them with torch and uses only its stable ABI;
_xla.abi3.so offers them to XLA, for JAX and TensorFlow, and is built where jaxlib's headers are.
"""

import importlib.util
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
            kernels_folder = os.path.relpath("torch_rwkv6", ext.name.split(".")[0])
            ext.extra_link_args = [
                *ext.extra_link_args,
                self.get_ext_fullpath(KERNELS),
                f"-Wl,-rpath,{BESIDE}/{kernels_folder}",
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
