"""The stand-in CUDA runtime in this process: load() it, then a library of build.cuda_library.

runtime = load()
library = ctypes.CDLL(str(build.cuda_library("name", sources, ["80", "90"])))
x = runtime.array(np.ones(8, np.float32))  # in device memory, that is NumPy's as well
library.launch(x.ctypes.data_as(ctypes.c_void_p), runtime.stream())
for launch in runtime.launches(): print(launch.name, launch.statistics["global_load_bytes"])
"""

import contextlib
import ctypes
import functools
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import build

# What settings() sets, by default: each also PTXCPU_<NAME> in the environment.
DEFAULTS = {
    "check": 2,  # 0 ... 2, see interpreter.py
    "order": 0,  # of warps and blocks
    "statistics": 1,
    "footprint": 0,  # count distinct sectors
    "execute": 1,  # 0: launches are recorded, and their kernels do not run
    "verbose": 0,  # a line on stderr for each launch
    "abort": 0,  # on errors, for a debugger
    "devices": 1,
    "cc": 80,  # compute capability
    "driver": 13000,  # the CUDA version that it supports; 0: no driver
    "multiprocessors": 0,  # 108, or 132 from cc 90 on
    "registers": 0,  # of a thread, for the occupancy; 0: as many as launch bounds allow
}
NO_KERNEL_IMAGE, LAUNCH_FAILURE = 209, 719


@dataclass(frozen=True)
class Launch:
    kernel: str  # as the compiler mangles it
    name: str  # demangled
    device: int
    stream: int
    target: int  # 80: the PTX that ran was for sm_80
    grid: list[int]
    block: list[int]
    shared: int  # dynamic, bytes
    status: int  # cudaError_t
    seconds: float
    statistics: dict[str, int]  # the fields of Statistics in src/memory.h
    messages: list[str]  # what was wrong
    instructions: dict[str, int]  # how often warps executed each


class Runtime:
    def __init__(self) -> None:
        path = build.library() / "libcudart.so.13"
        # Libraries that were linked with it find it there already, also beside a real
        # libcudart.so.13, which a torch for CUDA loads: its name and symbol versions are its own.
        self.cuda = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.cuda.ptxcpu_configure.argtypes = [ctypes.c_char_p, ctypes.c_int]
        self.cuda.ptxcpu_stats_json.restype = ctypes.c_char_p
        self.cuda.cudaMalloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.cuda.cudaGetErrorName.restype = ctypes.c_char_p
        for name in ("cudaFree", "cudaStreamDestroy", "ptxcpu_unregister"):
            getattr(self.cuda, name).argtypes = [ctypes.c_void_p]
        self.cuda.ptxcpu_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    @contextlib.contextmanager
    def settings(self, **values: int) -> Iterator[None]:
        """The settings named in DEFAULTS, until the end of the with statement; then the defaults
        again, whatever the environment says."""
        self._configure(values)
        try:
            yield
        finally:
            self._configure({name: DEFAULTS[name] for name in values})

    def _configure(self, values: dict[str, int]) -> None:
        for name, value in values.items():
            if not self.cuda.ptxcpu_configure(name.encode(), value):
                raise ValueError(f"{name} is not one of {', '.join(DEFAULTS)}")

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(self.cuda.cudaGetErrorName(status).decode())

    def reset(self) -> None:
        """Forgets launches and calls."""
        self.cuda.ptxcpu_reset_stats()

    def _stats(self) -> dict[str, Any]:
        return json.loads(self.cuda.ptxcpu_stats_json())

    def launches(self) -> list[Launch]:
        """Since reset."""
        return [Launch(**launch) for launch in self._stats()["launches"]]

    def calls(self) -> dict[str, int]:
        """How often functions of the runtime were called since reset."""
        return self._stats()["calls"]

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        before = ctypes.c_int()
        self.cuda.cudaGetDevice(ctypes.byref(before))
        self._check(self.cuda.cudaSetDevice(index))
        try:
            yield
        finally:
            self._check(self.cuda.cudaSetDevice(before.value))

    def stream(self) -> int:
        """A new stream of the current device."""
        handle = ctypes.c_void_p()
        self._check(self.cuda.cudaStreamCreate(ctypes.byref(handle)))
        return handle.value or 0

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
        """Device memory: kernels see its bounds. Its floating-point numbers are NaN at first."""
        array = np.empty(shape, dtype)  # for its size
        address = ctypes.c_void_p()
        self._check(self.cuda.cudaMalloc(ctypes.byref(address), max(array.nbytes, 1)))
        memory = (ctypes.c_uint8 * max(array.nbytes, 1)).from_address(address.value or 0)
        weakref.finalize(memory, self.cuda.cudaFree, address.value)
        return np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)

    def array(self, values: np.ndarray) -> np.ndarray:
        """A copy in device memory."""
        array = self.empty(values.shape, values.dtype)
        array[...] = values
        return array

    @contextlib.contextmanager
    def lend(self, address: int, size: int) -> Iterator[None]:
        """Memory of the host, a torch tensor's perhaps, is the current device's meanwhile."""
        self.cuda.ptxcpu_register(address, size)
        try:
            yield
        finally:
            self.cuda.ptxcpu_unregister(address)


@functools.cache
def load() -> Runtime:
    return Runtime()
