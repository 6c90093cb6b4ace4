"""A NaN or an infinity goes where the recurrence takes it, in the CUDA kernels too."""

import itertools
import math

import pytest
import torch
from ptxcpu import build
from samples import Call, random_call
from test_nonfinite import NAMES, same_elements_are_finite

from torch_rwkv6 import reference

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason=build.NVCC_MISSING)
if build.find_nvcc():
    from cuda.gpu import gpu as gpu_of
    from cuda.gpu import unwritten_checkpoints

T = 70
BORDERS = {  # of quads, chunks, checkpoints and segments
    T: (0, 3, 4, 15, 16, 63, 64, 69),
    134: (0, 4, 16, 127, 128, 133),
}


@pytest.fixture
def gpu():
    device = gpu_of()
    with device.runtime.settings(check=0, statistics=0):
        yield device
    device.free()


def broken_tensors(tensors):
    """Each tensor with one value that is none, at the borders in turn."""
    values = itertools.cycle((math.nan, math.inf, -math.inf))
    for name, x in tensors.items():
        if name in ("u", "initial_state", "grad_final_state"):
            places = [(*(0 for _ in x.shape[:-1]), 3), tuple(n - 1 for n in x.shape)]
        else:
            places = [(0, t, t % x.shape[2], 5 * t % x.shape[3]) for t in BORDERS[x.shape[1]]]
        for place in places:
            changed = x.clone()
            changed[place] = next(values)
            yield f"{changed[place]} in {name} at {place}", {**tensors, name: changed}


def check(gpu, call):
    """In turn the gradients come from both outputs, from y alone and from the state alone."""
    tensors = dict(zip(NAMES, (*call.grad_outputs(), *call.floats()), strict=True))
    sources = itertools.cycle(((0, 1), (0,), (1,)))
    for what, broken in broken_tensors(tensors):
        grads, floats = list(broken.values())[:2], list(broken.values())[2:]
        now = Call(*floats, call.state_map, call.cu_seqlens)
        exact = now.double().args()
        y, final_state, *kept = gpu.forward(now, checkpoints=unwritten_checkpoints(now))
        same_elements_are_finite((y, final_state), reference.wkv(*exact), what)
        source = next(sources)
        grads = [x if i in source else None for i, x in enumerate(grads)]
        found = gpu.backward(now, *grads, *kept)
        expected = reference.wkv_backward(*(x if x is None else x.double() for x in grads), *exact)
        same_elements_are_finite(found, expected, f"{what}, gradients of outputs {source}")


@pytest.mark.parametrize("tokens", [134, T], ids=["segments", "one segment"])
@pytest.mark.parametrize(
    ("family", "dtype", "N"),
    [
        ("chunked", torch.bfloat16, 32),
        ("chunked", torch.float16, 64),
        ("recurrent", torch.float32, 20),
    ],
    ids=str,
)
def test_values_that_are_none(gpu, monkeypatch, family, dtype, N, tokens):
    monkeypatch.setenv("RWKV6_CUDA_KERNEL", family)
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", "128")
    check(gpu, random_call(B=1, T=tokens, H=2, N=N, dtype=dtype, states=1))


@pytest.mark.parametrize(
    ("family", "dtype", "N", "offsets"),
    [
        ("chunked", torch.bfloat16, 32, [0, 4, 16, T]),
        ("recurrent", torch.float32, 5, [0, 2, 134]),  # the second one has two segments
    ],
    ids=str,
)
def test_packed_sequences_keep_theirs(gpu, monkeypatch, family, dtype, N, offsets):
    monkeypatch.setenv("RWKV6_CUDA_KERNEL", family)
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", "128")
    tokens, states = offsets[-1], len(offsets) - 1
    check(gpu, random_call(1, tokens, 2, N, dtype, states=states, cu_seqlens=offsets))


@pytest.mark.parametrize(
    ("family", "dtype", "N", "tokens"),
    [
        ("chunked", torch.bfloat16, 32, T),
        ("recurrent", torch.float32, 20, T),
        ("recurrent", torch.float32, 20, 1),
    ],
    ids=str,
)
def test_nothing_but_its_own_gradient_depends_on_the_last_decay(
    gpu, monkeypatch, family, dtype, N, tokens
):
    monkeypatch.setenv("RWKV6_CUDA_KERNEL", family)
    call = random_call(B=1, T=tokens, H=2, N=N, dtype=dtype, states=1)
    call.w[0, -1, 1, 3] = math.nan
    grad_y, _ = call.grad_outputs()
    found = gpu.backward(call, grad_y, None)
    expected = reference.wkv_backward(grad_y.double(), None, *call.double().args())
    same_elements_are_finite(found, expected, "gradients of y")
    assert found[3].isnan().sum() == 1
