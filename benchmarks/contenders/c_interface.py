"""torch_rwkv6's kernel library called from C, as ggml's is: what decoding costs without Python."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

import torch_rwkv6
from benchmarks.work import Arrays, Job, UnsupportedError, Work

LIBRARY = Path(torch_rwkv6.__file__).with_name("librwkv6.so")
CPU, FLOAT = 1, 2  # kDLCPU, kDLFloat


class DLTensor(ctypes.Structure):
    """https://dmlc.github.io/dlpack/latest/c_api.html"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


INPUTS = ("r", "k", "v", "w", "u", "initial_state", "state_map", "cu_seqlens")


class WkvInputs(ctypes.Structure):
    """rwkv6_wkv_inputs of csrc/include/rwkv6.h."""

    _fields_ = tuple((name, ctypes.POINTER(DLTensor)) for name in INPUTS)


def dl_tensor(x: np.ndarray) -> DLTensor:
    """The memory of x, contiguous, as a DLTensor. x must outlive it."""
    shape = (ctypes.c_int64 * x.ndim)(*x.shape)
    bits = x.itemsize * 8
    return DLTensor(x.ctypes.data, CPU, 0, x.ndim, FLOAT, bits, 1, shape, None, 0)


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    if work.kind != "decode" or work.dtype != "float32":
        raise UnsupportedError("measured for decoding in float32 only")
    if threads != 1:
        raise UnsupportedError("threads are the calling program's: measured on one")
    library = ctypes.CDLL(str(LIBRARY))
    run = library.rwkv6_wkv_update
    run.restype = ctypes.c_char_p
    state, y = inputs["state"].copy(), np.empty_like(inputs["r"])
    held = [inputs[name] for name in ("r", "k", "v", "w", "u")]
    given = ctypes.byref(WkvInputs(*(ctypes.pointer(dl_tensor(x)) for x in held)))
    state_tensor, y_tensor = (ctypes.byref(dl_tensor(x)) for x in (state, y))

    def call() -> None:
        error = run(None, given, state_tensor, y_tensor)
        if error is not None:
            raise RuntimeError(error.decode())

    def arrays(_: None) -> Arrays:
        return {"y": y, "state": state}

    return Job(call, arrays, f"torch_rwkv6 {torch_rwkv6.__version__}")
