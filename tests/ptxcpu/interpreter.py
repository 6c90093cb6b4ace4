"""Runs the kernels of a PTX module on NumPy arrays.

    module = Module(build.ptx(Path("kernel.cu"), "80"))
    stats = module.launch("part_of_its_name", grid, block, [x, y, np.int32(n)])

Arrays become pointers, whose bounds are checked; scalars are NumPy scalars of the parameter's
size; bfloat16 is np.uint16 (bfloat16, from_bfloat16 convert). launch raises PtxError for what the
checks found, or with strict=False returns the texts as "messages".
"""

import ctypes
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import build


class PtxError(Exception):
    """What the checks found in a launch, or why a kernel cannot run."""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.library() / "libptxcpu.so"))
    pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, *arguments in [
        ("ptxcpu_load", pointer, text),
        ("ptxcpu_error", text),
        ("ptxcpu_unload", None, pointer),
        ("ptxcpu_describe", text, pointer),
        ("ptxcpu_launch", text, pointer, text, pointer, pointer, pointer, integer, text),
    ]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _three(extent: int | Sequence[int]) -> tuple[int, int, int]:
    given = (extent,) if isinstance(extent, int) else tuple(extent)
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


class Module:
    def __init__(self, ptx: str) -> None:
        self._module = _library().ptxcpu_load(ptx.encode())
        if not self._module:
            raise PtxError(_library().ptxcpu_error().decode())
        self.kernels: dict[str, dict[str, Any]] = json.loads(
            _library().ptxcpu_describe(self._module)
        )

    def __del__(self) -> None:
        if getattr(self, "_module", None):
            _library().ptxcpu_unload(self._module)

    def find(self, part: str) -> str:
        """The one kernel of that name, or with that in its name."""
        found = [name for name in self.kernels if name == part]
        found = found or [name for name in self.kernels if part in name]
        if len(found) != 1:
            raise PtxError(f"{part!r} names {found} of the kernels {list(self.kernels)}")
        return found[0]

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[np.ndarray | np.generic | bytes | None],
        shared: int = 0,
        check: int = 2,
        order: int = 0,
        statistics: bool = True,
        footprint: bool = False,
        strict: bool = True,
        buffers: Sequence[np.ndarray] = (),
    ) -> dict[str, Any]:
        """arguments: an array is a pointer to it, bytes are a structure, None a null pointer.
        buffers: arrays that the kernel may touch and that are not arguments.
        shared: bytes of dynamic shared memory. check: 0 only bounds, alignment, divergence and
        barriers, 1 races between warps and uninitialised shared memory as well, 2 also those
        within a warp. order of the warps and blocks: 0 rising, 1 falling, from 2 on random with
        that seed. The result has the fields of Statistics in src/memory.h, "messages", and
        "instructions": how often warps executed each.
        """
        name = self.find(name)
        kernel = self.kernels[name]
        if kernel["error"]:
            raise PtxError(kernel["error"])
        if len(kernel["parameters"]) != len(arguments):
            raise PtxError(f"{name} has {len(kernel['parameters'])} parameters")
        parameters, regions = bytearray(kernel["parameter_bytes"]), []
        for i, ((offset, size), argument) in enumerate(zip(kernel["parameters"], arguments)):
            if isinstance(argument, np.ndarray):
                regions += [argument.ctypes.data, argument.nbytes]
                value = argument.ctypes.data.to_bytes(8, "little")
            elif isinstance(argument, np.generic):
                value = argument.tobytes()
            else:
                value = bytes(8) if argument is None else argument
            if len(value) != size:
                raise PtxError(f"parameter {i} of {name} has {size} bytes, not {len(value)}")
            parameters[offset : offset + size] = value
        for array in buffers:
            regions += [array.ctypes.data, array.nbytes]
        done = json.loads(
            _library().ptxcpu_launch(
                self._module,
                name.encode(),
                (ctypes.c_uint32 * 7)(*_three(grid), *_three(block), shared),
                (ctypes.c_int * 4)(check, order, statistics, footprint),
                (ctypes.c_uint64 * len(regions))(*regions),
                len(regions) // 2,
                bytes(parameters),
            )
        )
        if strict and done["messages"]:
            raise PtxError("\n".join(done["messages"]))
        messages, instructions = done["messages"], done["instructions"]
        return done["statistics"] | {"messages": messages, "instructions": instructions}


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even; as np.uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)
