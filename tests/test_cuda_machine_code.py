"""What ptxas made of the CUDA kernels in the installed library, looked at without a GPU.

The table of all that is asserted here, in Markdown: cd tests, then python -m test_cuda_machine_code
"""

import ctypes
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ptxcpu import build, sass
from samples import random_call

import torch_rwkv6

LIBRARY = Path(torch_rwkv6.__file__).with_name("librwkv6.so")


def architectures() -> list[str]:
    """Of the kernels, such as "80"; none where the library was built without CUDA."""
    names = ctypes.CDLL(str(LIBRARY)).rwkv6_cuda_architectures
    names.restype = ctypes.c_char_p
    return [name.replace(".", "") for name in (names() or b"").decode().split(", ") if name]


ARCHITECTURES = architectures()
DISASSEMBLER = build.find_tool("nvdisasm") and build.find_tool("cuobjdump")
pytestmark = [
    pytest.mark.skipif(not ARCHITECTURES, reason="built without CUDA kernels"),
    pytest.mark.skipif(build.find_nvcc() is None, reason=build.NVCC_MISSING),
    pytest.mark.skipif(not DISASSEMBLER, reason="nvdisasm or cuobjdump was not found"),
]

# Bytes a thread, where it is not 0. With 512 threads a block the backward of head size 128 has 128
# registers a thread, for a state, its gradient and what is between them.
MOST_STACK = {f"backward_chunked<{dtype}, 128>": 160 for dtype in ("Bf16", "F16")}
MOST_STACK |= {f"state_walk<{dtype}, 128, true>": 32 for dtype in ("Bf16", "F16")}
# A word or two, outside of the loops over elements.
MOST_STACK |= {"state_sum<float>": 8, "backward_recurrent<float, 256>": 8}
# Two tokens at once, of which a few words are kept aside, outside of the loop over keys.
MOST_STACK |= {f"forward_recurrent<float, {N}>": 16 for N in (64, 128, 256)}
MOST_STACK |= {f"forward_recurrent<double, {N}>": 16 for N in (64, 256)}
# A word more than on 8.0 and 9.0.
MOST_STACK_ELSEWHERE = {f"state_walk<{dtype}, 64, false>": 8 for dtype in ("Bf16", "F16")}
MOST_STACK_ELSEWHERE |= {f"backward_recurrent<double, {N}>": 8 for N in (64, 256)}
MOST_STACK_ELSEWHERE["state_sum<double>"] = 8
# Of a multiprocessor, by registers and shared memory: one with 164 KB of it or more, and one with
# 100 KB, where another kernel takes the place of one that has no room.
LEAST_WARPS = {
    "forward_chunked<Bf16, 32>": (10, 6),
    "forward_chunked<Bf16, 64>": (12, 8),
    "forward_chunked<Bf16, 128>": (8, 8),
    "backward_chunked<Bf16, 32>": (16, 8),
    "backward_chunked<Bf16, 64>": (16, 8),
    "backward_chunked<Bf16, 128>": (16, 0),
    "state_walk<Bf16, 32, false>": (20, 14),
    "state_walk<Bf16, 64, false>": (20, 16),
    "state_walk<Bf16, 128, false>": (16, 16),
    "state_sum<float>": (16, 14),
    "forward_recurrent<float, 32>": (16, 10),
    "forward_recurrent<float, 64>": (12, 10),
    "forward_recurrent<float, 128>": (12, 12),
    "forward_recurrent<float, 256>": (12, 12),
    "backward_recurrent<float, 32>": (8, 5),
    "backward_recurrent<float, 64>": (8, 4),
    "backward_recurrent<float, 128>": (12, 4),
    "backward_recurrent<float, 256>": (8, 4),
}
# Which takes more registers there.
FEWER_WARPS = {("100", "backward_chunked<Bf16, 32>"): 12}


@dataclass(frozen=True)
class Shape:
    """Of a kernel's blocks, as the host launches them."""

    threads: int
    dynamic_shared: int  # bytes


def label(name: str) -> str:
    """forward_chunked<Bf16, 64>, of the demangled name of a kernel."""
    found = re.search(r"(\w+)_kernel(<[^>]*>)?", name)
    assert found, name
    return found[1] + (found[2] or "").replace("rwkv6::cuda::", "")


@functools.cache
def kernels(arch: str) -> dict[str, sass.Kernel]:
    """By label."""
    found = {label(kernel.name): kernel for kernel in sass.inspect(LIBRARY, arch)}
    if not found:
        pytest.skip(f"built without code for sm_{arch}: see TORCH_CUDA_ARCH_LIST")
    return found


@functools.cache
def shapes() -> dict[str, Shape]:
    """Of the kernels that use tensor cores or states, by label: launched over ptxcpu, unchecked."""
    from cuda.gpu import gpu as gpu_of

    gpu = gpu_of()
    cases = [("chunked", torch.bfloat16, N) for N in (32, 64, 128)]
    cases += [("recurrent", torch.float32, N) for N in (32, 64, 128, 256)]
    gpu.runtime.reset()
    # blocks as large as they get: the host makes them smaller where they do not fill the GPU
    with gpu.runtime.settings(check=0, statistics=0, multiprocessors=1):
        for family, dtype, N in cases:
            os.environ |= {"RWKV6_CUDA_KERNEL": family, "RWKV6_CUDA_SEGMENT": "128"}
            T = 129 if family == "chunked" else 1
            call = random_call(B=1, T=T, H=1, N=N, dtype=dtype)
            gpu.final_state(call)
            gpu.forward(call)
            gpu.backward(call, *call.grad_outputs())
    del os.environ["RWKV6_CUDA_KERNEL"], os.environ["RWKV6_CUDA_SEGMENT"]
    return {
        label(launch.name): Shape(launch.block[0], launch.shared)
        for launch in gpu.runtime.launches()
    }


def occupancy(arch: str, name: str) -> sass.Occupancy:
    shape = shapes()[name]
    return kernels(arch)[name].occupancy(shape.threads, shape.dynamic_shared)


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def arch(request):
    return request.param


def test_registers_hold_what_threads_have(arch):
    """No stack, so no spills and no arrays in local memory."""
    for name, kernel in kernels(arch).items():
        most = MOST_STACK.get(name, 0)
        if arch not in ("80", "90"):
            most = max(most, MOST_STACK_ELSEWHERE.get(name, 0))
        assert kernel.stack_bytes <= most, name
        assert most or kernel.count("LDL") == kernel.count("STL") == 0, name


def test_every_access_names_its_memory(arch):
    """Generic ones would cost address checks, and mean that the compiler has lost track."""
    for name, kernel in kernels(arch).items():
        assert kernel.count("LD") == kernel.count("ST") == 0, name


def test_rows_come_16_bytes_at_a_time(arch):
    for name, kernel in kernels(arch).items():
        if re.match("forward_|backward_|state_", name):
            assert kernel.count("LDGSTS.128") > 0, name
        if "chunked" in name or "walk" in name:  # nothing comes in smaller pieces
            assert kernel.count("LDGSTS") == kernel.count("LDGSTS.128"), name
        if "_recurrent<float" in name or "_recurrent<double" in name:
            assert kernel.count("STG.128") > 0, name


def test_chunked_kernels_use_tensor_cores(arch):
    for name, kernel in kernels(arch).items():
        assert (kernel.count("HMMA") > 0) == ("chunked" in name or "walk" in name), name
        # 16-bit operands; of f32 ones, the others, ldmatrix has no transpose
        assert (kernel.count("LDSM") > 0) == ("backward_chunked" in name), name


def test_nothing_is_atomic(arch):
    for name, kernel in kernels(arch).items():
        assert kernel.count("ATOM") == kernel.count("ATOMG") == kernel.count("RED") == 0, name


@pytest.mark.parametrize("name", LEAST_WARPS)
def test_warps_of_a_multiprocessor(arch, name):
    least = LEAST_WARPS[name][sass.MULTIPROCESSORS[arch][2] < 164 << 10]
    assert occupancy(arch, name).warps >= FEWER_WARPS.get((arch, name), least)


def table() -> str:
    lines = [
        "| kernel | sm | threads | registers | shared | warps | limit | stack | HMMA | LDSM | "
        "16 B loads | 16 B stores | other accesses | main loop |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(shapes()):
        for arch in ARCHITECTURES:
            kernel, shape, at = kernels(arch)[name], shapes()[name], occupancy(arch, name)
            loads = kernel.count("LDG.128") + kernel.count("LDGSTS.128")
            stores = kernel.count("STG.128")
            accesses = sum(kernel.count(each) for each in ("LDG", "LDGSTS", "STG"))
            loop = kernel.main_loop
            cells = [
                f"`{name}`", arch, shape.threads, kernel.registers,
                kernel.shared_bytes + shape.dynamic_shared, at.warps, at.limit,
                kernel.stack_bytes, kernel.count("HMMA"), kernel.count("LDSM"), loads, stores,
                accesses - loads - stores,
                f"{len(loop.instructions)}, {loop.issue_cycles} cycles" if loop else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
