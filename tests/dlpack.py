"""The C interface's structs in ctypes, for tests that call it without torch operators."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

K_CPU, K_CUDA = 1, 2


class DLTensor(ctypes.Structure):
    _fields_ = [
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
    ]


PARALLEL_FOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64,
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), ctypes.c_void_p,
)  # fmt: skip
ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Context(ctypes.Structure):
    _fields_ = [
        ("parallel_for", PARALLEL_FOR),
        ("pool", ctypes.c_void_p),
        ("num_threads", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("allocate", ALLOCATE),
    ]


def _struct_of_tensors(name: str, fields: str) -> type[ctypes.Structure]:
    pointers = [(field, ctypes.POINTER(DLTensor)) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": pointers})


WkvInputs = _struct_of_tensors("WkvInputs", "r k v w u initial_state state_map cu_seqlens")
WkvGradients = _struct_of_tensors(
    "WkvGradients", "grad_r grad_k grad_v grad_w grad_u grad_initial_state"
)


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
