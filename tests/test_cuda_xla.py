"""The XLA binding's CUDA handlers, called without a GPU and without XLA: see tests/cuda.

The kernels run in the interpreter, as in test_cuda_kernels.py; XLA is tests/cuda/xla_call.cpp.
"""

import ctypes
import functools
import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from dlpack import ALLOCATE, DLTensor
from ptxcpu import build
from samples import random_call, relative_rms
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from torch_rwkv6 import reference

jaxlib = importlib.util.find_spec("jaxlib")
pytestmark = [
    pytest.mark.skipif(build.find_nvcc() is None, reason=build.NVCC_MISSING),
    pytest.mark.skipif(jaxlib is None, reason="XLA's headers come with jaxlib"),
]
if build.find_nvcc():
    from cuda.gpu import ROOT, Gpu, Memory, build_library
    from cuda.gpu import gpu as gpu_of

BF16, F32 = torch.bfloat16, torch.float32
LIMIT = {F32: 5e-6, BF16: 4e-3}  # relative to float64
FAMILIES = [("recurrent", F32, 20), ("chunked", BF16, 32)]


@functools.cache
def binding() -> ctypes.CDLL:
    """The binding and the stand-in for XLA, linked to the library for the stand-in runtime."""
    kernels, library = build_library(), ROOT / "build/cuda-tests/xla.so"
    headers = Path(jaxlib.origin).with_name("include")
    command = [
        "g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc/include'}",
        *(arg for path in (*include_paths(), headers) for arg in ("-isystem", path)),
        ROOT / "csrc/bindings/xla.cpp", ROOT / "tests/cuda/xla_call.cpp",
        f"-L{kernels.parent}", f"-l:{kernels.name}", f"-Wl,-rpath,{kernels.parent}", "-o", library,
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    gpu_of()  # loads the stand-in runtime, which the library looks for
    loaded = ctypes.CDLL(str(library))
    loaded.xla_call.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def gpu():
    device = gpu_of()
    yield device
    device.free()


def run(gpu: "Gpu", handler: str, operands: list, results: list, states: int = 0) -> list[Tensor]:
    """Calls a handler for tensors, or for memory of the device. RuntimeError with its message."""
    memory = [[Memory(gpu, x) if isinstance(x, Tensor) else x for x in xs]
              for xs in (operands, results)]  # fmt: skip
    allocate = ALLOCATE(lambda _, size: gpu.allocate(size))
    lists = [(ctypes.POINTER(DLTensor) * len(xs))(*(ctypes.pointer(m.dl) for m in xs))
             for xs in memory]  # fmt: skip
    message = binding().xla_call(
        getattr(binding(), handler), None, allocate, lists[0], len(operands), lists[1],
        len(results), ctypes.c_int64(states),
    )  # fmt: skip
    if message is not None:
        raise RuntimeError(message.decode())
    return [m.read() for m in memory[1]]


def unwritten(*like: Tensor) -> list[Tensor]:
    return [torch.full_like(x, 7) for x in like]


def inputs(dtype, N, B=3, T=33, states=True):
    """r, k, v, w, u [B, H, N], perhaps state [B, H, N, N]: every batch row has its own u."""
    call = random_call(B=B, T=T, H=2, N=N, dtype=dtype, states=B if states else None)
    u = call.u * torch.arange(1, B + 1, dtype=dtype)[:, None, None]
    state = [] if call.initial_state is None else [call.initial_state.float()]
    return [call.r, call.k, call.v, call.w, u, *state]


def expected_of(operands, grads=None):
    """y and final state, or the gradients, of each batch row by itself, in float64."""
    rows = []
    for b in range(operands[0].shape[0]):
        r, k, v, w, u, *state = (x.double()[b : b + 1] for x in operands)
        call = (r, k, v, w, u[0], state[0] if state else None, None, None)
        if grads is None:
            rows.append(reference.wkv(*call))
            continue
        found = reference.wkv_backward(*(g.double()[b : b + 1] for g in grads), *call)
        rows.append([*found[:4], found[4][None], *found[5 : len(operands)]])
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(("family", "dtype", "N"), FAMILIES)
def test_forward_and_backward(gpu, monkeypatch, family, dtype, N, states):
    monkeypatch.setenv("RWKV6_CUDA_KERNEL", family)
    operands = inputs(dtype, N, states=states)
    B, H = operands[4].shape[:2]
    outputs = unwritten(operands[0], torch.empty(B, H, N, N))
    found = run(gpu, "rwkv6_xla_forward_cuda", operands, outputs)
    for a, b in zip(found, expected_of(operands), strict=True):
        assert relative_rms(a, b) <= LIMIT[dtype]

    grads = [torch.randn(operands[0].shape).to(dtype), torch.randn(B, H, N, N)]
    results = unwritten(*operands)
    found = run(gpu, "rwkv6_xla_backward_cuda", [*grads, *operands], results)
    for a, b in zip(found, expected_of(operands, grads), strict=True):
        assert relative_rms(a, b) <= LIMIT[dtype]


def test_a_donated_state_is_updated_in_place(gpu):
    operands = inputs(F32, 20)
    state = Memory(gpu, operands[5])
    y, final = run(gpu, "rwkv6_xla_forward_cuda", [*operands[:5], state],
                   [*unwritten(operands[0]), state])  # fmt: skip
    for a, b in zip((y, final), expected_of(operands), strict=True):
        assert relative_rms(a, b) <= LIMIT[F32]


def test_state_map_is_not_read(gpu):
    operands = inputs(F32, 20, T=3)
    outputs = unwritten(operands[0], operands[5])
    far_out = torch.tensor([9, -1, 0], dtype=torch.int32)
    found = run(gpu, "rwkv6_xla_forward_cuda", [*operands, far_out], outputs, states=2)
    for a, b in zip(found, expected_of(operands), strict=True):
        assert relative_rms(a, b) <= LIMIT[F32]


@pytest.mark.parametrize("T", [0, 1])
def test_few_tokens(gpu, T):
    operands = inputs(F32, 20, T=T)
    found = run(gpu, "rwkv6_xla_forward_cuda", operands, unwritten(operands[0], operands[5]))
    assert relative_rms(found[1], expected_of(operands)[1]) <= LIMIT[F32]


def test_an_empty_batch(gpu):
    operands = inputs(F32, 20, B=0)
    y, state = run(gpu, "rwkv6_xla_forward_cuda", operands, unwritten(operands[0], operands[5]))
    assert y.shape == (0, 33, 2, 20)
    assert state.shape == (0, 2, 20, 20)
    gradients = run(gpu, "rwkv6_xla_backward_cuda", [y, state, *operands], unwritten(*operands))
    assert [x.shape for x in gradients] == [x.shape for x in operands]


def test_wrong_shapes_are_an_error(gpu):
    r, k, v, w, u, state = inputs(F32, 20, T=3)
    with pytest.raises(RuntimeError, match=r"u: expected shape \[3, 2, 20\]"):
        run(gpu, "rwkv6_xla_forward_cuda", [r, k, v, w, u[:2].clone(), state], [r + 0, state + 0])
