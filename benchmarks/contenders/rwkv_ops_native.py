"""rwkv-ops (successor of rwkv6-keras-operator): its native kernel on the torch backend of Keras."""

from __future__ import annotations

import importlib.metadata
import os

os.environ["KERAS_BACKEND"] = "torch"
os.environ["KERNEL_TYPE"] = "native"

from rwkv_ops import get_rwkv6_kernel

from benchmarks.contenders.torch_job import torch_job
from benchmarks.work import Arrays, Job, Work


def prepare(work: Work, inputs: Arrays, threads: int) -> Job:
    shape = (work.B, work.T, work.H, work.N)
    op = get_rwkv6_kernel(
        HEAD_SIZE=work.N, KERNEL_TYPE="native", MAX_SEQUENCE_LENGTH=max(work.T, 1)
    )

    def wkv(r, k, v, w, u, state):
        flat = (x.flatten(2) for x in (r, k, v, w))  # it wants [B, T, H * N]
        y, state = op(*flat, u, initial_state=state, output_final_state=True)
        return y.reshape(shape), state

    job = torch_job(work, inputs, threads, wkv)
    job.version = f"rwkv-ops {importlib.metadata.version('rwkv-ops')}"
    return job
