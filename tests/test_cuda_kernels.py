"""The CUDA kernels, launch code included, executed without a GPU: see tests/cuda/gpu.py.

What runs is the PTX that nvcc makes, with every check of the interpreter on:
races, bounds, alignment, uninitialised memory, divergent barriers.
"""

import ctypes

import pytest
import torch
from dlpack import ALLOCATE, Context
from ptxcpu import build
from samples import SLOW_DECAYS, Call, random_call, relative_rms, sample_inputs, slow_call

import torch_rwkv6
from torch_rwkv6 import reference

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason=build.NVCC_MISSING)
if build.find_nvcc():
    from cuda.gpu import Gpu, Memory, unwritten_checkpoints
    from cuda.gpu import gpu as gpu_of

LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 200)
SOME_LENGTHS = (1, 17, 65)
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# against float64; the exact answer rounded to bfloat16 costs 1.66e-3, to float16 2.1e-4
FORWARD = {F64: 1e-14, F32: 1e-6, BF16: 2.5e-3, F16: 3.2e-4}
BACKWARD = {F64: 1e-13, F32: 5e-6, BF16: 2.5e-3, F16: 3.2e-4}
CAPABILITIES = (80, 86, 89, 90, 100, 120)  # of GPUs that differ in what a multiprocessor holds
# (family, dtype, head size, T): each family on what it is for
CASES = [
    *(("chunked", BF16, N, T) for N in (32, 64) for T in LENGTHS),
    *(("chunked", BF16, 128, T) for T in SOME_LENGTHS),
    *(("chunked", F16, 64, T) for T in SOME_LENGTHS),
    *(("recurrent", F32, N, T) for N in (20, 64) for T in LENGTHS),
    *(("recurrent", F32, N, T) for N in (1, 100, 128) for T in SOME_LENGTHS),
    *(("recurrent", dtype, 64, T) for dtype in (BF16, F16, F64) for T in SOME_LENGTHS),
    ("recurrent", F32, 256, 17),
]
SMALL = [("recurrent", F32, 20), ("recurrent", BF16, 32), ("chunked", BF16, 32)]


def kernel_id(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(params=(80, 90), ids="sm_{}".format)
def gpu(request):
    device = gpu_of()
    with device.runtime.settings(cc=request.param):
        yield device
    device.free()


@pytest.fixture
def sm_80():
    """Where one architecture is enough, because it is about the host's code."""
    yield gpu_of()
    gpu_of().free()


@pytest.fixture
def force(monkeypatch):
    return lambda family: monkeypatch.setenv("RWKV6_CUDA_KERNEL", family)


def check_forward(gpu: "Gpu", call: Call, factor: float = 1.0, **outputs):
    found = gpu.forward(call, **outputs)
    expected = reference.wkv(*call.double().args())
    for name, a, b in zip(("y", "final_state"), found, expected, strict=True):
        assert relative_rms(a, b) <= factor * FORWARD[a.dtype], name
    return found


def check_backward(
    gpu: "Gpu",
    call: Call,
    factor: float = 1.0,
    given: str = "y state",
    kept: torch.Tensor | None = None,
):
    grad_y, grad_state = call.grad_outputs()
    grad_y = grad_y if "y" in given else None
    grad_state = grad_state if "state" in given else None
    found = gpu.backward(call, grad_y, grad_state, kept)
    zeros = [torch.zeros_like(x, dtype=F64) for x in call.grad_outputs()]
    exact = [z if g is None else g.double() for g, z in zip((grad_y, grad_state), zeros)]
    expected = reference.wkv_backward(*exact, *call.double().args())
    for name, a, b in zip(("r", "k", "v", "w", "u", "initial_state"), found, expected):
        half = a.dtype in (BF16, F16)
        # a gradient in float32 beside inputs in half precision is computed as theirs
        limit = BACKWARD[a.dtype if half or name == "initial_state" else call.r.dtype]
        assert relative_rms(a, b) <= factor * limit, name
    return found


@pytest.mark.parametrize(("family", "dtype", "N", "T"), CASES, ids=kernel_id)
def test_accuracy_with_extreme_decays(gpu, force, family, dtype, N, T):
    force(family)
    call = random_call(B=1, T=T, H=2, N=N, dtype=dtype, extreme=True, states=1)
    # a root mean square of few numbers, each rounded, scatters
    factor = 1.0 if N * T >= 500 else 2.0
    check_forward(gpu, call, factor)
    check_backward(gpu, call, factor)


@pytest.mark.parametrize("cc", CAPABILITIES)
def test_kernels_fit_every_gpu(sm_80, force, cc):
    with sm_80.runtime.settings(cc=cc, check=0, statistics=0):
        for dtype, w_dtype, N in ((BF16, BF16, 128), (BF16, F32, 128), (F16, F16, 64)):
            force("chunked")
            call = random_call(B=1, T=17, H=1, N=N, dtype=dtype, w_dtype=w_dtype, states=1)
            check_forward(sm_80, call, 1.5)
            check_backward(sm_80, call, 1.5)
        force("recurrent")
        for N in (20, 256):
            call = random_call(B=1, T=3, H=1, N=N, states=1)
            check_forward(sm_80, call)
            check_backward(sm_80, call)


def test_what_does_not_fit_is_staged_in_one_buffer(sm_80, force):
    force("chunked")
    call = random_call(B=1, T=70, H=1, N=128, dtype=BF16)
    shared, gradients, grads = {}, [], call.grad_outputs()
    for cc in (80, 86):
        sm_80.runtime.reset()
        with sm_80.runtime.settings(cc=cc):
            gradients.append(sm_80.backward(call, *grads))
        (launch,) = (x for x in sm_80.runtime.launches() if "backward_chunked" in x.name)
        shared[cc] = launch.shared
    assert shared[86] <= 99 * 1024 < shared[80]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("segment", ["9999", "512"])
@pytest.mark.parametrize("decays", SLOW_DECAYS)
def test_slow_decays(sm_80, force, monkeypatch, decays, segment):
    force("recurrent")
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", segment)
    call = slow_call(decays)
    with sm_80.runtime.settings(check=0, statistics=0):
        check_forward(sm_80, call)
        check_backward(sm_80, call)
        state = sm_80.final_state(call)
    assert relative_rms(state, reference.wkv(*call.double().args())[1]) <= FORWARD[F32]


@pytest.mark.parametrize("forgetting", [0, 1])
@pytest.mark.parametrize("dtype", [F32, F64], ids=kernel_id)
def test_a_decay_that_vanishes_forgets_any_state(gpu, dtype, forgetting):
    """Of a large state, or its gradient, nothing is left, and what is added is not lost in it."""
    call = random_call(B=1, T=40, H=1, N=32, dtype=dtype, states=1)
    call.w[:, forgetting] = call.w[:, -1 - forgetting] = torch.tensor([5.0, 20.0, 88.0, 90.0] * 8)
    call.initial_state.fill_(1e30)
    call.r[:, : forgetting + 1] = 0  # these tokens would read the old state
    check_forward(gpu, call)
    grad_y, grad_state = call.grad_outputs()[0], torch.full_like(call.initial_state, 1e30)
    found = gpu.backward(call, grad_y, grad_state)
    expected = reference.wkv_backward(grad_y.double(), grad_state.double(), *call.double().args())
    between = slice(forgetting + 1, -1 - forgetting)  # gradients of the others are as large
    for name, a, b in zip("rkvw", found, expected):
        assert relative_rms(a[:, between], b[:, between]) <= BACKWARD[dtype], name


@pytest.mark.parametrize("name", list(sample_inputs()))
@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_options(gpu, force, family, dtype, N, name):
    force(family)
    call = sample_inputs(dtype, N=N, T=20)[name]
    check_forward(gpu, call, 1.5)
    check_backward(gpu, call, 1.5)


@pytest.mark.parametrize("given", ["y", "state", "neither"])
@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_gradients_of_one_output(sm_80, force, family, dtype, N, given):
    force(family)
    check_backward(sm_80, random_call(T=20, N=N, dtype=dtype, states=2), 1.5, given)


@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_pool_of_states_in_place(gpu, force, monkeypatch, family, dtype, N):
    force(family)
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", "64")
    options = {"H": 2, "N": N, "dtype": dtype}
    for call in (
        random_call(B=4, T=18, states=6, state_map=[4, -1, 0, -7], **options),
        random_call(B=4, T=1, states=5, state_map=[3, 1, 2, -1], **options),
        random_call(B=2, T=17, states=2, **options),
        random_call(B=3, T=70, states=4, state_map=[3, -1, 0], **options),
        random_call(
            B=1, T=40, states=5, cu_seqlens=[0, 17, 17, 19, 40], state_map=[3, 1, -1, 0], **options
        ),
    ):
        y, state = gpu.update(call)
        rows = list(range(call.sequences))
        if call.state_map is not None:
            rows = call.state_map.tolist()
        exact = call.double()
        exact.state_map = torch.tensor([max(row, 0) for row in rows])
        expected_y, finals = reference.wkv(*exact.args())
        expected = call.initial_state.double()
        for m, row in enumerate(rows):
            if row < 0:  # a padding row
                begin, end = 0, call.r.shape[1]
                if call.cu_seqlens is not None:
                    begin, end = call.cu_seqlens[m : m + 2].tolist()
                expected_y[0 if call.cu_seqlens is not None else m, begin:end] = 0
            else:
                expected[row] = finals[m]
        untouched = sorted(set(range(len(state))) - set(rows))
        assert torch.equal(state[untouched], call.initial_state[untouched])
        assert relative_rms(state, expected) <= 1.5 * FORWARD[state.dtype]
        assert relative_rms(y, expected_y) <= 1.5 * FORWARD[dtype]


@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_wrong_entries_of_state_map(gpu, force, family, dtype, N):
    """Such a sequence gets NaN, its neighbours what they would get without it."""
    force(family)
    wild = [1, -1, 3, 0, 2**40, -(2**62)]
    call = random_call(B=6, T=18, H=1, N=N, dtype=dtype, states=3, state_map=wild)
    wrong, right = [1, 2, 4, 5], [0, 3]
    y, state = gpu.forward(call)
    grad_y, grad_state = call.grad_outputs()
    *grads, grad_u, grad_initial = gpu.backward(call, grad_y, grad_state)
    for x in (y, state, *grads):
        assert x[wrong].isnan().all()
    assert grad_u.isnan().all()
    good = Call(*(x[right] for x in call.floats()[:4]), call.u, call.initial_state)
    good.state_map = call.state_map[right]
    expected = gpu.forward(good)
    expected_grads = gpu.backward(good, grad_y[right], grad_state[right])
    for a, b in zip((y, state, *grads), (*expected, *expected_grads), strict=False):
        assert torch.equal(a[right], b)
    assert torch.equal(grad_initial, expected_grads[5])
    assert (grad_initial[2] == 0).all()  # nobody starts there


@pytest.mark.parametrize(
    "offsets", [[0, 30, 20, 40], [1, 20, 40], [0, 20, 39], [0, 2**40, 40], [-5, 20, 40], [0, 41]]
)
@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_wrong_cu_seqlens(gpu, force, family, dtype, N, offsets):
    force(family)
    call = random_call(B=1, T=40, H=1, N=N, dtype=dtype, states=1, cu_seqlens=offsets)
    outputs = [*gpu.forward(call), *gpu.backward(call, *call.grad_outputs())]
    assert all(x.isnan().all() for x in outputs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=kernel_id)
def test_strided_indices(sm_80, dtype):
    call = random_call(B=3, T=4, N=8, states=4, state_map=[3, 0, 3], index_dtype=dtype)
    expected = sm_80.forward(call)
    call.state_map = call.state_map.repeat_interleave(2)[::2]
    assert call.state_map.stride() == (2,)
    assert all(torch.equal(a, b) for a, b in zip(sm_80.forward(call), expected, strict=True))


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values in other memory, the last dimension contiguous."""
    if kind == "heads first":  # [..., H, T, N] in memory
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    gap = {"padded": 8, "odd": 3}[kind]  # "odd": rows that no 16-byte load can read
    wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), 7, dtype=x.dtype)
    view = wide[..., gap:]
    view.copy_(x)
    return view


@pytest.mark.parametrize("kind", ["heads first", "padded", "odd"])
@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_strides(gpu, force, family, dtype, N, kind):
    force(family)
    call = random_call(T=18, H=3, N=N, dtype=dtype, states=2)
    y, state = gpu.forward(call)
    grad_y, grad_state = call.grad_outputs()
    grads = gpu.backward(call, grad_y, grad_state)
    other = call.map(lambda x: x if x is call.u else strided(x, kind))
    if kind == "odd" and family == "chunked":
        with pytest.raises(RuntimeError, match="chunked: a row of a tensor is not aligned"):
            gpu.forward(other)
        gpu.free()
        force("")  # another family of kernels, then
        check_forward(gpu, other, 1.5)
        return
    found = gpu.forward(other, strided(torch.zeros_like(y), kind), strided(state, kind))
    assert all(torch.equal(a, b) for a, b in zip(found, (y, state), strict=True))
    found = gpu.backward(other, strided(grad_y, kind), strided(grad_state, kind))
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))


def test_expanded_inputs(gpu):
    call = random_call(T=18, N=20, states=2)
    call.w = call.w[:1, :1].expand(call.r.shape)  # RWKV-5: one decay for all tokens
    check_forward(gpu, call)


@pytest.mark.parametrize("N", [20, 32])
def test_w_and_u_in_float32_beside_bfloat16(gpu, N):
    call = random_call(T=40, N=N, H=2, dtype=BF16, w_dtype=F32, states=2)
    call.u = call.u.float()
    check_forward(gpu, call)
    *_, grad_w, grad_u, _ = check_backward(gpu, call)
    assert grad_w.dtype == grad_u.dtype == F32


@pytest.mark.parametrize("N", [20, 32])
def test_initial_state_in_the_inputs_dtype(gpu, N):
    call = random_call(B=3, T=40, N=N, dtype=BF16, states=1, state_dtype=BF16)
    check_forward(gpu, call)
    assert check_backward(gpu, call)[5].dtype == BF16


@pytest.mark.parametrize("dtype", [F32, F64], ids=kernel_id)
def test_gradients_of_a_state_that_many_start_from(gpu, dtype):
    """They add up in the order of the sequences: repeats are the same bits, unused rows zero."""
    state_map = [2, 0, 2, 2, 0, 5, 2, 0, 0, 2, *[3] * 30, 5, 0]
    call = random_call(B=42, T=3, H=2, N=5, dtype=dtype, states=6, state_map=state_map)
    grads = call.grad_outputs()
    found = gpu.backward(call, *grads)[5]
    call.initial_state, call.state_map = call.initial_state[state_map], None
    expected = torch.zeros_like(found)
    for row, each in zip(state_map, gpu.backward(call, *grads)[5], strict=True):
        expected[row] += each
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 5, 0, 4), (2, 0, 2, 4)], ids=str)
def test_nothing_to_do(sm_80, shape):
    call = random_call(*shape, states=3, state_map=[2] * shape[0])
    y, state = sm_80.forward(call)
    assert y.shape == shape
    assert torch.equal(state, call.initial_state[call.state_map])
    *_, grad_u, grad_initial = sm_80.backward(call, *call.grad_outputs())
    assert (grad_u == 0).all()
    assert (grad_initial[:2] == 0).all()


def test_no_packed_sequence(sm_80):
    call = random_call(B=1, T=0, cu_seqlens=[0], states=1)
    assert sm_80.forward(call)[1].shape == (0, 2, 4, 4)
    *_, grad_u, grad_initial = sm_80.backward(call, *call.grad_outputs())
    assert (grad_u == 0).all()
    assert (grad_initial == 0).all()
    with pytest.raises(RuntimeError, match="cu_seqlens: no sequence for T = 3 tokens"):
        sm_80.forward(random_call(B=1, T=3, cu_seqlens=[0]))


@pytest.mark.parametrize("name", ["plain", "packed, state map"])
@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_the_order_of_threads_does_not_matter(gpu, force, family, dtype, N, name):
    force(family)
    call = sample_inputs(dtype, N=N, T=40)[name]
    grads = call.grad_outputs()
    results = []
    for order in (0, 1, 7, 0):  # and a repeat is the same
        with gpu.runtime.settings(order=order):
            results.append([*gpu.forward(call), *gpu.backward(call, *grads)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["plain", "packed, state map", "state map"])
@pytest.mark.parametrize(
    ("family", "dtype", "N"),
    [("chunked", BF16, 32), ("recurrent", F32, 20), ("recurrent", F32, 64), ("recurrent", F64, 17)],
    ids=kernel_id,
)
def test_segments(sm_80, force, monkeypatch, family, dtype, N, name):
    """A long sequence of few heads is cut for more blocks; here forced on a short one."""
    force(family)
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", "64")  # a backward's are 128
    call = sample_inputs(dtype, N=N, T=270)[name]
    check_forward(sm_80, call)
    check_backward(sm_80, call)


@pytest.mark.parametrize(
    ("tokens", "heads", "multiprocessors", "cu_seqlens", "cut"),
    [
        (512, 1, 132, None, True),  # one block would leave all but one multiprocessor empty
        (512, 16, 1, None, False),  # segments would only wait for each other
        (128, 1, 132, None, False),  # the scan would take longer
        (512, 1, 132, [0, 5, 5, 500, 512], True),
        (512, 1, 132, [*range(0, 512, 30), 512], False),  # short ones
    ],
    ids=["one head", "a full GPU", "few tokens", "packed", "packed, few tokens each"],
)
@pytest.mark.parametrize(
    ("family", "dtype", "walk"),
    [("chunked", BF16, "state_walk"), ("recurrent", F32, "state_sum")],
    ids=kernel_id,
)
def test_segments_where_they_gain(
    sm_80, force, family, dtype, walk, tokens, heads, multiprocessors, cu_seqlens, cut
):
    force(family)
    call = random_call(B=1, T=tokens, H=heads, N=32, dtype=dtype, cu_seqlens=cu_seqlens)
    sm_80.runtime.reset()
    with sm_80.runtime.settings(multiprocessors=multiprocessors, check=0, statistics=0):
        check_forward(sm_80, call)
    kernels = [launch.name for launch in sm_80.runtime.launches()]
    assert any(walk in name for name in kernels) == cut
    assert cut or len(kernels) == 1 + (cu_seqlens is not None)


@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_wrong_sequences_cut_into_segments(sm_80, force, monkeypatch, family, dtype, N):
    """All of such a sequence is NaN, and nothing of its neighbours."""
    force(family)
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", "64")
    call = random_call(B=3, T=140, H=1, N=N, dtype=dtype, states=2, state_map=[1, 2, 0])
    *grads, grad_u, grad_initial = sm_80.backward(call, *call.grad_outputs())
    for x in (*sm_80.forward(call), *grads):
        assert x[1].isnan().all()
        assert x[[0, 2]].isfinite().all()
    assert grad_u.isnan().all()
    assert grad_initial.isfinite().all()
    call = random_call(B=1, T=140, H=1, N=N, dtype=dtype, states=1, cu_seqlens=[0, 130, 20, 140])
    outputs = [*sm_80.forward(call), *sm_80.backward(call, *call.grad_outputs())]
    assert all(x.isnan().all() for x in outputs)


@pytest.mark.parametrize(
    ("T", "cu_seqlens", "segment"),
    [(140, None, "9999"), (260, None, "128"), (263, [0, 130, 130, 263], "9999")],
    ids=["one segment", "two segments", "packed"],
)
@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_kept_states(sm_80, force, monkeypatch, family, dtype, N, T, cu_seqlens, segment):
    """The forward keeps those of the CPU's, and from them the backward has the same gradients."""
    force(family)
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", segment)
    call = random_call(B=1, T=T, H=1, N=N, dtype=dtype, states=1, cu_seqlens=cu_seqlens)
    *outputs, kept = sm_80.forward(call, checkpoints=unwritten_checkpoints(call))
    assert all(map(torch.equal, outputs, sm_80.forward(call)))
    *_, expected = torch.ops.rwkv6.wkv_checkpointed(*call.args())
    assert relative_rms(kept, expected[: len(kept)]) <= FORWARD[F32]
    check_backward(sm_80, call, 1.5, kept=kept)


@pytest.mark.parametrize(
    ("options", "segment"),
    [
        ({"T": 140, "states": 1}, "9999"),
        ({"T": 200, "B": 2, "states": 3, "state_map": [2, 0]}, "64"),
        ({"T": 263, "B": 1, "cu_seqlens": [0, 130, 130, 140, 263]}, "64"),
        ({"T": 0}, "64"),
    ],
    ids=["one segment", "four segments", "packed", "no token"],
)
@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_the_final_state_alone(sm_80, force, monkeypatch, family, dtype, N, options, segment):
    """What the segments add, and the scan: no y is computed."""
    force(family)
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", segment)
    call = random_call(**{"H": 2, "N": N, "dtype": dtype, "extreme": True} | options)
    sm_80.runtime.reset()
    found = sm_80.final_state(call)
    expected = reference.wkv(*call.double().args())[1]
    assert relative_rms(found, expected) <= FORWARD[F32]
    names = [launch.name for launch in sm_80.runtime.launches()]
    assert not any("forward" in name for name in names)
    assert sum("scan" in name for name in names) == 1


@pytest.mark.parametrize(("family", "dtype", "N"), SMALL[1:], ids=kernel_id)
def test_the_final_state_alone_of_wrong_sequences_is_nan(sm_80, force, family, dtype, N):
    force(family)
    call = random_call(B=3, T=40, N=N, dtype=dtype, states=2, state_map=[1, 2, 0])
    found = sm_80.final_state(call)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    call = random_call(B=1, T=40, N=N, dtype=dtype, cu_seqlens=[0, 30, 20, 40])
    assert sm_80.final_state(call).isnan().all()


def test_the_same_as_the_cpus_kernels(gpu):
    call = random_call(B=2, T=40, H=2, N=24, states=2, extreme=True)
    y, state = torch_rwkv6.wkv(*call.floats())
    for a, b in zip(gpu.forward(call), (y, state), strict=True):
        assert relative_rms(a, b) <= 1e-6
    grads = call.grad_outputs()
    expected = torch.ops.rwkv6.wkv_backward(*grads, *call.args())
    for a, b in zip(gpu.backward(call, *grads), expected, strict=True):
        assert relative_rms(a, b) <= 5e-6


def test_infinite_decays(gpu):
    for dtype, N in ((F32, 20), (BF16, 32)):
        call = random_call(T=40, N=N, dtype=dtype, states=2)
        call.w[:, 5] = torch.inf
        call.w[:, 7] = -torch.inf
        check_forward(gpu, call)
        check_backward(gpu, call)


@pytest.mark.parametrize(("dtype", "N"), [(F32, 20), (BF16, 32)], ids=kernel_id)
def test_padding_leaves_the_state_bit_for_bit(gpu, monkeypatch, dtype, N):
    monkeypatch.setenv("RWKV6_CUDA_SEGMENT", "64")
    call = random_call(T=70, N=N, dtype=dtype, states=2)
    call.w[:] = -1e9
    call.k[:] = 0
    call.v[:] = 0
    assert torch.equal(gpu.forward(call)[1], call.initial_state)


def test_the_choice_of_kernels(sm_80, force):
    force("chunked")
    for options, problem in (
        ({"dtype": F32, "N": 32}, "inputs are not bfloat16 or float16"),
        ({"dtype": BF16, "N": 40}, "the head size is not 32, 64 or 128"),
    ):
        with pytest.raises(RuntimeError, match=f"RWKV6_CUDA_KERNEL=chunked: {problem}"):
            sm_80.forward(random_call(**options))
    force("fast")
    with pytest.raises(RuntimeError, match="RWKV6_CUDA_KERNEL=fast: expected recurrent or chunked"):
        sm_80.forward(random_call())


def outputs_of(call: Call) -> list[torch.Tensor]:
    return [torch.empty_like(call.r), torch.empty_like(call.initial_state)]


def test_tensors_on_two_devices_are_refused(sm_80):
    call = random_call(states=2)
    arguments = [*call.args(), *outputs_of(call)]
    with sm_80.runtime.settings(devices=2):
        with sm_80.on(1, 0):
            arguments[1] = Memory(sm_80, call.k)
        with pytest.raises(RuntimeError, match=r"k: expected .* CUDA device 0, got .* device 1"):
            sm_80.run("forward", *arguments)


@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_launches_go_to_the_callers_stream_and_device(sm_80, force, family, dtype, N):
    force(family)
    runtime = sm_80.runtime
    call = random_call(B=1, T=40, N=N, dtype=dtype, states=1, cu_seqlens=[0, 30, 40])
    grads = call.grad_outputs()
    expected = [*sm_80.forward(call), *sm_80.backward(call, *grads)]
    with runtime.settings(devices=2):
        with runtime.device(1):
            stream = runtime.stream()
        with sm_80.on(1, stream):
            runtime.reset()
            found = [*sm_80.forward(call), *sm_80.backward(call, *grads)]
        current = ctypes.c_int(-1)
        runtime.cuda.cudaGetDevice(ctypes.byref(current))
        assert current.value == 0
    assert {(launch.device, launch.stream) for launch in runtime.launches()} == {(1, stream)}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("family", "dtype", "N"), SMALL, ids=kernel_id)
def test_capture_in_a_graph(sm_80, force, monkeypatch, family, dtype, N):
    """Which CUDA refuses where something waits, allocates or uses the default stream."""
    force(family)
    runtime, cuda = sm_80.runtime, sm_80.runtime.cuda
    call = random_call(B=1, T=40, N=N, dtype=dtype, states=1, cu_seqlens=[0, 30, 40])
    expected = sm_80.forward(call)
    before = [torch.full_like(x, 7) for x in expected]
    memory = [Memory(sm_80, x) if x is not None else None for x in (*call.args(), *before)]
    lent = [sm_80.allocate(1 << 20) for _ in range(9)]
    monkeypatch.setattr(sm_80, "context", Context(allocate=ALLOCATE(lambda pool, size: lent.pop())))
    stream = ctypes.c_void_p(runtime.stream())
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    with sm_80.on(0, stream.value):
        assert cuda.cudaStreamBeginCapture(stream, 0) == 0
        sm_80.run("forward", *memory)
        assert cuda.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert all(torch.equal(m.read(), x) for m, x in zip(memory[-2:], before, strict=True))
    assert cuda.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)) == 0
    assert cuda.cudaGraphLaunch(executable, stream) == 0
    assert all(torch.equal(m.read(), x) for m, x in zip(memory[-2:], expected, strict=True))


def test_a_gpu_without_code_is_named(sm_80):
    with sm_80.runtime.settings(cc=75), pytest.raises(RuntimeError) as error:
        sm_80.forward(random_call())
    assert "CUDA device 0 has compute capability 7.5" in str(error.value)
    assert "it was built for 8.0 (" in str(error.value)


@pytest.mark.parametrize(("driver", "runs"), [(0, True), (12040, False), (13000, True)])
def test_a_driver_that_is_too_old_is_named(sm_80, driver, runs):
    problem = sm_80.library.rwkv6_cuda_problem
    problem.restype = ctypes.c_char_p
    with sm_80.runtime.settings(driver=driver):
        text = problem()
    assert (text is None) == runs
    if not runs:
        assert b"the NVIDIA driver runs CUDA 12.4 and older, the kernels were built with" in text
        assert text.endswith(b"or build them with an nvcc of CUDA 12")


def test_a_call_that_is_lent_no_memory_is_refused(sm_80, monkeypatch):
    call = random_call(B=1, T=5, states=1, cu_seqlens=[0, 5])
    arguments = [*call.args(), *outputs_of(call)]
    monkeypatch.setattr(sm_80, "context", Context())
    with pytest.raises(RuntimeError, match="context: tensors on a GPU need one with"):
        sm_80.run("forward", *arguments)
    monkeypatch.setattr(sm_80, "context", Context(allocate=ALLOCATE(lambda pool, size: None)))
    with pytest.raises(RuntimeError, match="out of memory"):
        sm_80.run("forward", *arguments)
