"""ggml's rwkv_wkv6, which llama.cpp runs, with the operations that make the decays before it.

The graph is built once and computed repeatedly, as in llama.cpp. Its time does not include the copy
of the new state back into llama.cpp's cache.
"""

from __future__ import annotations

import ctypes
import importlib.metadata

import ggml
import numpy as np

from benchmarks.work import Arrays, Job, UnsupportedError, Work


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    if work.kind not in ("forward", "decode"):
        raise UnsupportedError("has no backward")
    if work.dtype != "float32":
        raise UnsupportedError("computes in float32 only")
    B, T, H, N = work.B, work.T, work.H, work.N
    floats = 8 * B * T * H * N + 2 * B * H * N * N + H * N  # inputs, decays' 3, y and the state
    context = ggml.ggml_init(ggml.ggml_init_params(mem_size=4 * floats + 2**20, mem_buffer=None))

    def tensor(x: np.ndarray, *shape: int):
        """ggml counts dimensions from the innermost: the bytes are the same."""
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        made = ggml.ggml_new_tensor(context, ggml.GGML_TYPE_F32, len(shape), sizes)
        x = np.ascontiguousarray(x, np.float32)
        ctypes.memmove(ggml.ggml_get_data(made), x.ctypes.data, x.nbytes)
        return made

    r, k, v, w = (tensor(inputs[name], N, H, B * T) for name in ("r", "k", "v", "w"))
    u, state = tensor(inputs["u"], N, H), tensor(inputs["state"], H * N * N, B)
    decay = ggml.ggml_exp(context, ggml.ggml_neg(context, ggml.ggml_exp(context, w)))
    out = ggml.ggml_rwkv_wkv6(context, k, v, r, u, decay, state)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, out)
    plan = ggml.ggml_graph_plan(graph, threads, None)
    scratch = (ctypes.c_uint8 * max(plan.work_size, 1))()
    plan.work_data = ctypes.cast(scratch, ctypes.POINTER(ctypes.c_uint8))

    def call() -> None:
        if ggml.ggml_graph_compute(graph, ctypes.byref(plan)) != ggml.GGML_STATUS_SUCCESS:
            raise RuntimeError("ggml_graph_compute failed")

    def arrays(_: None) -> Arrays:
        size = B * T * H * N + B * H * N * N
        data = ctypes.cast(ggml.ggml_get_data(out), ctypes.POINTER(ctypes.c_float * size))
        flat = np.frombuffer(data.contents, np.float32)
        return {
            "y": flat[: B * T * H * N].reshape(B, T, H, N),
            "state": flat[B * T * H * N :].reshape(B, H, N, N),
        }

    return Job(call, arrays, f"ggml-python {importlib.metadata.version('ggml-python')}")
