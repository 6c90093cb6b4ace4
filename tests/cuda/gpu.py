"""A GPU made of a CPU: the kernel library's C interface, its host code included, over ptxcpu.

The library is compiled from the sources that setup.py compiles, but to PTX and against the stand-in
CUDA runtime. Memory of the "device" is a region of its own for every tensor, and whatever a kernel
does outside of these, or before it is initialised, makes the call fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from dlpack import ALLOCATE, K_CUDA, Context, DLTensor, WkvGradients, WkvInputs, int64s
from ptxcpu import build, runtime
from samples import Call
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from torch_rwkv6.contract import CHECKPOINT_TOKENS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc/cuda"))
import nvcc  # noqa: E402

# The kernels' PTX is the same for all architectures: no source asks which one it is compiled for.
ARCHITECTURE = 80
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
CODES = {"f": 2, "i": 0, "b": 4}  # bfloat16


def compiled_kernels(csrc: Path) -> list[str]:
    """setup.py's objects of the CUDA kernels, if they are those of the sources and have PTX for the
    ARCHITECTURE in plain text (the Makefile asks for that: it spares the tests a minute).
    """
    objects = [csrc.parent / f"build/cuda/{file.name}.o" for file in (csrc / "cuda").glob("*.cu")]
    sources = [file for name in ("*.h", "include/*", "cuda/*") for file in csrc.glob(name)]
    newest = max(file.stat().st_mtime for file in sources)
    for file in objects:
        if not file.exists() or file.stat().st_mtime < newest:
            return []
        contents = file.read_bytes()
        if b".target sm_%d\n" % ARCHITECTURE not in contents:
            return []
    return list(map(str, objects))


def build_library(csrc: Path = ROOT / "csrc") -> Path:
    """The kernel library with PTX for the ARCHITECTURE, and no kernels for the CPU."""
    kernels = compiled_kernels(csrc)
    sources = [*csrc.glob("*.cpp"), *([] if kernels else (csrc / "cuda").glob("*.cu"))]
    sources.append(Path(__file__).with_name("no_cpu_kernels.cpp"))
    options = [
        "-std=c++20", "-O3", "--no-compress", "-Xcompiler=-fPIC", f"-I{csrc}",
        f"-I{csrc / 'include'}", *(arg for path in include_paths() for arg in ("-isystem", path)),
        f"-gencode=arch=compute_{ARCHITECTURE},code=compute_{ARCHITECTURE}",
    ]  # fmt: skip
    folder = csrc.parent / "build/cuda-tests"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "librwkv6-ptx.so"  # not the name of the other one, which may be loaded too
    with open(folder / "lock", "w") as lock:  # of several test processes the first one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        toolkit = nvcc.toolkit()
        assert toolkit, "the tests of the CUDA kernels need nvcc"
        objects = toolkit.compile(sorted(map(str, sources)), options, folder) + kernels
        newest = max(Path(name).stat().st_mtime for name in objects)
        if not library.exists() or library.stat().st_mtime < newest:
            command = [toolkit.nvcc, "-shared", "--cudart=shared", "--cudadevrt=none"]
            command += [f"-L{build.library()}", f"-Xlinker=-soname={library.name}", *objects]
            subprocess.run([*command, "-o", library], check=True)
    return library


class Memory:
    """A tensor copied to the device as it lies in its storage: with strides, offset and gaps."""

    def __init__(self, gpu: Gpu, host: Tensor):
        self._gpu, self._host = gpu, host
        self._bytes = host.untyped_storage().nbytes()
        with gpu.runtime.device(gpu.device):
            self.address = gpu.allocate(self._bytes)
        gpu.copy(self.address, host.untyped_storage().data_ptr(), self._bytes, HOST_TO_DEVICE)
        self.dl = DLTensor(
            self.address, K_CUDA, gpu.device, host.dim(), *_code(host.dtype), 1,
            int64s(host.shape), int64s(host.stride()), host.storage_offset() * host.element_size(),
        )  # fmt: skip

    def read(self) -> Tensor:
        """What the device holds now; what lies between the elements must be what it was."""
        before = torch.tensor([], dtype=torch.uint8).set_(self._host.untyped_storage())
        after = torch.empty_like(before)
        self._gpu.copy(after.data_ptr(), self.address, self._bytes, DEVICE_TO_HOST)
        layout = (self._host.storage_offset(), self._host.shape, self._host.stride())
        found = torch.tensor([], dtype=self._host.dtype).set_(after.untyped_storage(), *layout)
        result = found.clone()
        found.copy_(self._host)
        assert torch.equal(after, before), "an output was written to beside its elements"
        return result


def _code(dtype: torch.dtype) -> tuple[int, int]:
    """DLPack's type code and number of bits."""
    name = str(dtype).removeprefix("torch.")
    return CODES[name[0]], dtype.itemsize * 8


class Gpu:
    """The kernel library over the stand-in runtime. All calls of a test share its device."""

    def __init__(self, library: Path):
        self.runtime = runtime.load()
        self.library = ctypes.CDLL(str(library))
        for name in ("rwkv6_wkv_forward", "rwkv6_wkv_backward", "rwkv6_wkv_update"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.context = Context(allocate=ALLOCATE(lambda pool, size: self.allocate(size)))
        self.device = 0
        self._allocated: list[int] = []

    @contextlib.contextmanager
    def on(self, device: int, stream: int) -> Iterator[None]:
        """Tensors are on that device and calls on that stream, meanwhile."""
        self.device, self.context.stream = device, stream
        try:
            yield
        finally:
            self.device, self.context.stream = 0, None

    def allocate(self, size: int) -> int:
        """Memory of the current device, its numbers NaN."""
        address = ctypes.c_void_p()
        assert self.runtime.cuda.cudaMalloc(ctypes.byref(address), max(size, 1)) == 0
        assert address.value
        self._allocated.append(address.value)
        return address.value

    def copy(self, to: int, source: int, size: int, kind: int) -> None:
        arguments = ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), kind
        assert size == 0 or self.runtime.cuda.cudaMemcpy(*arguments) == 0

    def run(self, name: str, *tensors: Tensor | Memory | None) -> list[Memory | None]:
        """Calls rwkv6_wkv_<name>. RuntimeError with the message that it returns.

        The tensors are the inputs, r to cu_seqlens, and then the other arguments in their order.
        """
        memory = [Memory(self, x) if isinstance(x, Tensor) else x for x in tensors]
        pointers = [None if m is None else ctypes.pointer(m.dl) for m in memory]
        inputs, others = WkvInputs(*pointers[:8]), pointers[8:]
        if name == "forward":
            others += [None] * (3 - len(others))  # no checkpoints
        if name == "backward":
            others[3:] = [ctypes.pointer(WkvGradients(*others[3:]))]
        function = getattr(self.library, f"rwkv6_wkv_{name}")
        message = function(ctypes.byref(self.context), ctypes.byref(inputs), *others)
        if message is not None:
            checks = [text for each in self.runtime.launches()[-1:] for text in each.messages]
            raise RuntimeError("\n".join([message.decode(), *checks]))
        return memory

    def free(self) -> None:
        for address in self._allocated:
            assert self.runtime.cuda.cudaFree(address) == 0
        self._allocated.clear()

    def forward(
        self,
        call: Call,
        y: Tensor | None = None,
        state: Tensor | None = None,
        checkpoints: Tensor | None = None,
    ):
        """y [B, T, H, N] and final_state [B or M, H, N, N]; into memory laid out as y and state.

        With memory for checkpoints [B * P, H, N, N] these as well.
        """
        y = _unwritten(call.r) if y is None else y
        state = _unwritten_states(call) if state is None else state
        memory = self.run("forward", *call.args(), y, state, checkpoints)[8:]
        outputs = tuple(m.read() for m in memory if m is not None)
        self.free()
        return outputs

    def final_state(self, call: Call):
        """final_state [B or M, H, N, N], without y."""
        _, k, v, w, _, *others = call.args()
        state = _unwritten_states(call)
        *_, memory = self.run("forward", None, k, v, w, None, *others, None, state)
        found = memory.read()
        self.free()
        return found

    def backward(
        self,
        call: Call,
        grad_y: Tensor | None,
        grad_state: Tensor | None,
        checkpoints: Tensor | None = None,
    ):
        """The gradients of r, k, v, w, u and, if there is one, initial_state."""
        grads = [None if x is None else _unwritten(x) for x in call.floats()]
        memory = self.run("backward", *call.args(), checkpoints, grad_y, grad_state, *grads)[11:]
        outputs = [m.read() for m in memory if m is not None]
        self.free()
        return outputs

    def update(self, call: Call):
        """y [B, T, H, N] and the updated state [S, H, N, N]."""
        inputs = replace(call, initial_state=None).args()
        *_, state, y = self.run("update", *inputs, call.initial_state, _unwritten(call.r))
        outputs = y.read(), state.read()
        self.free()
        return outputs


def _unwritten(x: Tensor) -> Tensor:
    """An output like x; no kernel writes 7 by chance everywhere."""
    return torch.full(x.shape, 7, dtype=x.dtype)


def _unwritten_states(call: Call, rows: int | None = None) -> Tensor:
    H, N = call.u.shape
    dtype = torch.float64 if call.r.dtype == torch.float64 else torch.float32
    return torch.full((call.sequences if rows is None else rows, H, N, N), 7, dtype=dtype)


def unwritten_checkpoints(call: Call) -> Tensor:
    """Memory for the states that a forward keeps, [B * P, H, N, N]."""
    B, T = call.r.shape[:2]
    return _unwritten_states(call, B * (T // CHECKPOINT_TOKENS))


@functools.cache
def gpu() -> Gpu:
    return Gpu(build_library())
