"""What the report about a GPU asks of the kernels: python -m benchmarks.gpu_check card|small|matrix

card: driver, limits and copy bandwidth. small: every kernel once, for compute-sanitizer. matrix:
both families of kernels against the recurrence in float64, repeated calls bit by bit, and more
than 2^31 elements where the card has the memory. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import torch_rwkv6
from benchmarks.gpu import copy_bandwidth, kernel_family
from torch_rwkv6 import reference

SIZES = (32, 64, 80, 128)
CHUNKED_SIZES = (32, 64, 128)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32, torch.float64)
OUTPUTS = ("y", "final_state", "r", "k", "v", "w", "u", "initial_state")
REPEATS = 20
Output = tuple[Tensor, ...]


def main(arguments: list[str]) -> None:
    if not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no NVIDIA GPU")
    if not torch_rwkv6.has_cuda_kernels:
        sys.exit("gpu_check: torch_rwkv6 was built without CUDA kernels")
    commands = {"card": card, "small": small, "matrix": matrix}
    if len(arguments) != 1 or arguments[0] not in commands:
        sys.exit(f"gpu_check: expected one of {', '.join(commands)}, got {' '.join(arguments)}")
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    commands[arguments[0]]()


def card() -> None:
    properties = torch.cuda.get_device_properties()
    fields = (
        "name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size",
        "shared_memory_per_block_optin", "shared_memory_per_multiprocessor",
        "regs_per_multiprocessor", "max_threads_per_multi_processor",
    )  # fmt: skip
    for name in fields:
        print(f"{name}: {getattr(properties, name, 'not told')}")
    driver = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        print("driver, power limit:", subprocess.check_output(driver, text=True).strip())
    except (OSError, subprocess.CalledProcessError) as problem:
        print(f"nvidia-smi: {problem}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}")
    print(f"copy, read and written: {copy_bandwidth():.0f} GB/s")


def small() -> None:
    """Calls every family of kernels once, for every head size and dtype."""
    for family, N, dtype in _kernels():
        with kernel_family(family):
            _forward_and_backward(_inputs(B=2, T=70, H=2, N=N, dtype=dtype))
            _decode(_inputs(B=2, T=1, H=2, N=N, dtype=dtype))
    torch.cuda.synchronize()
    print("done")


def matrix() -> None:
    wrong = []
    print(f"{'':28}" + "".join(f"{name:>14}" for name in OUTPUTS))
    for family, N, dtype in _kernels():
        inputs = _inputs(B=2, T=517, H=3, N=N, dtype=dtype)
        expected = _forward_and_backward([x.double() for x in inputs], reference.recurrence)
        with kernel_family(family):
            found = _forward_and_backward(inputs)
            again = [_forward_and_backward(inputs) for _ in range(REPEATS)]
            decoded = _decode(inputs)
        name = f"{family}, {str(dtype)[6:]}, N {N}"
        errors = [_relative(a, b) for a, b in zip(found, expected, strict=True)]
        print(f"{name:28}" + "".join(f"{error:14.1e}" for error in errors))
        limits = [_limit(x.dtype) for x in found]
        if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            wrong.append(f"{name}: error above {max(limits):.1e}")
        if not all(torch.equal(a, b) for more in again for a, b in zip(found, more, strict=True)):
            wrong.append(f"{name}: {REPEATS} repeats differ")
        if not all(_relative(a, b) <= _limit(a.dtype) for a, b in zip(decoded, expected)):
            wrong.append(f"{name}: token by token differs")
    wrong += large()
    print("\n".join(wrong) or "all right")
    sys.exit(bool(wrong))


def large() -> list[str]:
    """More than 2^31 elements in a tensor: the last heads must be computed as they are alone."""
    B, T, H, N = 1, 2**31 // (16 * 64) + 64, 16, 64
    if torch.cuda.mem_get_info()[0] < 6 * B * T * H * N * 2:
        print("2^31 elements: not enough memory free")
        return []
    inputs = _inputs(B, T, H, N, torch.bfloat16)
    y, state = torch_rwkv6.wkv(*inputs)
    *tokens, u, start = inputs
    last = [x[:, :, -1:].contiguous() for x in tokens]
    alone_y, alone_state = torch_rwkv6.wkv(*last, u[-1:], start[:, -1:])
    limit = _limit(torch.bfloat16)
    right = _relative(y[:, :, -1:], alone_y) <= limit
    right &= _relative(state[:, -1:], alone_state) <= limit
    print(f"2^31 elements: {'as' if right else 'NOT as'} the last head alone")
    return [] if right else ["2^31 elements: wrong"]


def _kernels() -> Iterator[tuple[str, int, torch.dtype]]:
    for N, dtype in itertools.product(SIZES, DTYPES):
        yield "recurrent", N, dtype
        if dtype in HALF and N in CHUNKED_SIZES:
            yield "chunked", N, dtype


def _inputs(B: int, T: int, H: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    """r, k, v, w, u and state, with 1 % of w at each of 5, 90 and -1e9."""
    r, k, v, w = (torch.randn(B, T, H, N, dtype=dtype) for _ in range(4))
    w -= 2
    place = torch.rand_like(w, dtype=torch.float32)
    for i, value in enumerate((5.0, 90.0, -1e9)):
        w[(place >= i / 100) & (place < (i + 1) / 100)] = value
    wide = torch.promote_types(dtype, torch.float32)
    return [r, k, v, w, torch.randn(H, N, dtype=dtype), torch.randn(B, H, N, N, dtype=wide)]


def _forward_and_backward(inputs: list[Tensor], wkv=torch_rwkv6.wkv) -> Output:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y, state = wkv(*leaves)
    grad_y = torch.arange(y.numel()).cos().view(y.shape).bfloat16().to(y.dtype)  # exact in all
    grads = torch.autograd.grad((y, state), leaves, (grad_y, torch.ones_like(state)))
    return y.detach(), state.detach(), *grads


def _decode(inputs: list[Tensor]) -> Output:
    *tokens, u, state = inputs
    state = state.clone()
    steps = zip(*(x.split(1, 1) for x in tokens), strict=True)
    y = [torch_rwkv6.wkv_update(*step, u, state) for step in steps]
    return torch.cat(y, 1), state


def _limit(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        return 5e-6
    return 2.5e-3


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


if __name__ == "__main__":
    main(sys.argv[1:])
