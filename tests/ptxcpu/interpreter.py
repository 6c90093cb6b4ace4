"""Runs the kernels of a PTX module on NumPy arrays.

    module = Module(build.ptx(Path("kernel.cu"), "80"))
    stats = module.launch("part_of_its_name", grid, block, [x, y, np.int32(n)])

Arrays become pointers, whose bounds are checked; scalars are NumPy scalars of the parameter's
size; bfloat16 is np.uint16 (bfloat16, from_bfloat16 convert). launch raises PtxError for what the
checks found, or with strict=False returns the texts as stats["messages"].
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import build

STATS = (
    "warp_instructions",
    "lane_instructions",
    "global_load_requests",
    "global_load_sectors",
    "global_load_bytes",
    "global_store_requests",
    "global_store_sectors",
    "global_store_bytes",
    "shared_requests",
    "shared_wavefronts",
    "shared_wavefronts_ideal",
    "flops",
    "mma_flops",
    "barriers",
    "atomics",
    "local_requests",
    "divergences",
    "errors",
)


class PtxError(Exception):
    """What the checks found in a launch, or why a kernel could not be loaded."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.library() / "libptxcpu.so"))
    pointer, text, integer, unsigned = (
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_uint32,
    )
    library.ptx_load.restype = pointer
    library.ptx_region.argtypes = [ctypes.c_uint64] * 2
    library.ptx_nparams.argtypes = [pointer, text]
    library.ptx_paraminfo.argtypes = [pointer, text, integer, pointer, pointer]
    library.ptx_kernels.argtypes = [pointer, text, integer]
    library.ptx_opcounts.argtypes = [pointer, text, integer]
    library.ptx_launch.argtypes = [pointer, text, *[unsigned] * 7, pointer, *[integer] * 3]
    return library


def _text(function: Any, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(1 << 18)
    function(*arguments, buffer, len(buffer))
    return buffer.value.decode()


def _three(extent: int | Sequence[int]) -> tuple[int, int, int]:
    given = (extent,) if isinstance(extent, int) else tuple(extent)
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


class Module:
    def __init__(self, ptx: str) -> None:
        library = _library()
        self._module = library.ptx_load(ptx.encode())
        self.load_errors = _text(library.ptx_errors).splitlines()
        if not self._module:
            raise PtxError("\n".join(self.load_errors))
        self.kernels = _text(library.ptx_kernels, self._module).split()

    def find(self, part: str) -> str:
        """The one kernel of that name, or with that in its name."""
        found = [name for name in self.kernels if name == part]
        found = found or [name for name in self.kernels if part in name]
        if len(found) != 1:
            raise PtxError(f"kernel {part!r} names {found}; load errors: {self.load_errors}")
        return found[0]

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[np.ndarray | np.generic | None],
        shared: int = 0,
        check: int = 2,
        order: int = 0,
        stats: bool = True,
        strict: bool = True,
    ) -> Mapping[str, Any]:
        """shared: bytes of dynamic shared memory. check: 0 only bounds, alignment, divergence and
        barriers, 1 races between warps and uninitialised shared memory as well, 2 also those
        within a warp. order of the warps: 0 rising, 1 falling, from 2 on random with that seed."""
        library, kernel = _library(), self.find(name).encode()
        count = library.ptx_nparams(self._module, kernel)
        if count != len(arguments):
            raise PtxError(f"{name} has {count} parameters, not {len(arguments)}")
        offset, size = ctypes.c_uint32(), ctypes.c_uint32()
        packed = bytearray(16)
        for i, argument in enumerate(arguments):
            library.ptx_paraminfo(self._module, kernel, i, ctypes.byref(offset), ctypes.byref(size))
            if argument is None:
                value = bytes(8)
            elif isinstance(argument, np.ndarray):
                library.ptx_region(argument.ctypes.data, argument.nbytes)
                value = argument.ctypes.data.to_bytes(8, "little")
            else:
                value = argument.tobytes()
            if len(value) != size.value:
                raise PtxError(f"parameter {i} of {name} has {size.value} bytes, not {len(value)}")
            packed.extend(bytes(max(0, offset.value + size.value - len(packed))))
            packed[offset.value : offset.value + size.value] = value
        status = library.ptx_launch(
            self._module,
            kernel,
            *_three(grid),
            *_three(block),
            shared,
            (ctypes.c_uint8 * len(packed)).from_buffer_copy(packed),
            check,
            stats,
            order,
        )
        library.ptx_clear_regions()
        messages = _text(library.ptx_errors).splitlines()
        if strict and status:
            raise PtxError("\n".join(messages))
        values = (ctypes.c_uint64 * len(STATS))()
        library.ptx_stats(values)
        return dict(zip(STATS, values)) | {"messages": messages}

    def instruction_counts(self) -> dict[str, int]:
        """How often warps executed each instruction of PTX in the last launch."""
        lines = _text(_library().ptx_opcounts, self._module).splitlines()
        return {name: int(count) for name, count in map(str.split, lines)}


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even; as np.uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)
