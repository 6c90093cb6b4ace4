"""What a GPU adds to the operator's promises: streams, graphs, devices, and no look at values.

With the other tests of the operator it runs on an NVIDIA GPU by `make test-gpu`. The kernels
themselves are proved without one, by test_cuda_kernels.py.
"""

import pytest
import torch
from samples import random_call, relative_rms

from torch_rwkv6 import reference, wkv, wkv_update

pytestmark = pytest.mark.gpu


def large_call(**options):
    return random_call(**({"B": 4, "T": 512, "H": 8, "N": 64, "dtype": torch.bfloat16} | options))


@pytest.mark.parametrize("N", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_training_shapes(dtype, N):
    call = random_call(B=2, T=1000, H=4, N=N, dtype=dtype, extreme=True, states=2)
    grads = call.grad_outputs()
    found = [
        *torch.ops.rwkv6.wkv(*call.args()),
        *torch.ops.rwkv6.wkv_backward(*grads, *call.args()),
    ]
    exact = call.double()
    expected = [
        *reference.wkv(*exact.args()),
        *reference.wkv_backward(*(g.double() for g in grads), *exact.args()),
    ]
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(a, b) <= {torch.float32: 5e-6}.get(a.dtype, 2.5e-3)


def test_repeats_are_bitwise_the_same():
    call = large_call(states=1)
    grads = call.grad_outputs()
    first = torch.ops.rwkv6.wkv_backward(*grads, *call.args())
    for _ in range(3):
        again = torch.ops.rwkv6.wkv_backward(*grads, *call.args())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_side_streams():
    calls = [large_call(seed=i) for i in range(4)]
    expected = [wkv(*call.floats()) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found = []
    for call, stream in zip(calls, streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(wkv(*call.floats()))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("T", [1, 512])
def test_capture_in_a_cuda_graph(T):
    call = large_call(T=T, states=4)
    *inputs, state = call.floats()
    start = state.clone()
    with torch.cuda.stream(torch.cuda.Stream()):  # warm-up, as capturing demands
        wkv_update(*inputs, state.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = wkv_update(*inputs, state)
    other = large_call(T=T, states=4, seed=1)
    for x, new in zip(inputs, other.floats(), strict=False):
        x.copy_(new)
    state.copy_(start)
    graph.replay()
    expected_state = start.clone()
    assert torch.equal(y, wkv_update(*inputs, expected_state))
    assert torch.equal(state, expected_state)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_another_device_than_the_current_one():
    call = large_call(states=1)
    expected = wkv(*call.floats())
    found = wkv(*call.map(lambda x: x.to("cuda:1")).floats())
    assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device.index == 1
        assert torch.equal(a.to("cuda:0"), b)


def test_a_wrong_entry_of_state_map_gives_nan():
    call = large_call(states=3, state_map=[0, 3, 2, -1])
    y, state = wkv(*call.floats(), state_map=call.state_map)
    right = call.map(lambda x: x)
    right.state_map = torch.tensor([0, 0, 2, 0])
    expected_y, expected_state = wkv(*right.floats(), state_map=right.state_map)
    assert torch.equal(y[[0, 2]], expected_y[[0, 2]])
    assert torch.equal(state[[0, 2]], expected_state[[0, 2]])
    assert y[[1, 3]].isnan().all()
    assert state[[1, 3]].isnan().all()


@pytest.mark.parametrize("cu_seqlens", [[0, 100, 50, 512], [1, 512], [0, 511], [0, 2**40, 512]])
def test_wrong_cu_seqlens_give_nan(cu_seqlens):
    call = large_call(B=1, cu_seqlens=cu_seqlens)
    y, state = wkv(*call.floats(), cu_seqlens=call.cu_seqlens)
    assert y.isnan().all()
    assert state.isnan().all()


def test_an_unknown_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("RWKV6_CUDA_KERNEL", "fast")
    with pytest.raises(RuntimeError, match="RWKV6_CUDA_KERNEL=fast: expected recurrent or chunked"):
        wkv(*large_call().floats())
