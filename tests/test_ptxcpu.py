"""The interpreter of PTX that the tests of the CUDA kernels stand on: right kernels compute what
they should, and wrong ones are reported."""

import ctypes

import numpy as np
import pytest
from ptxcpu import build
from ptxcpu.interpreter import Module, PtxError, bfloat16, from_bfloat16
from ptxcpu.runtime import LAUNCH_FAILURE, NO_KERNEL_IMAGE, load

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason=build.NVCC_MISSING)
KERNELS = build.HERE / "kernels"
ARCHITECTURES = ("80", "90")


def module(name: str, arch: str) -> Module:
    loaded = Module(build.ptx(KERNELS / f"{name}.cu", arch, ["--use_fast_math"]))
    assert not any(kernel["error"] for kernel in loaded.kernels.values())
    return loaded


@pytest.fixture(params=ARCHITECTURES)
def basic(request):
    return module("basic", request.param)


@pytest.fixture(params=ARCHITECTURES)
def tensor_cores(request):
    return module("tensor_cores", request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal_bfloat16(rng, *shape):
    """As bits and as float64."""
    bits = bfloat16(rng.standard_normal(shape))
    return bits, from_bfloat16(bits).astype(float)


def test_vector_add(basic, rng):
    a, b = rng.standard_normal((2, 1000)).astype(np.float32)
    c = np.full(1000, np.nan, np.float32)
    stats = basic.launch("vecadd", 8, 128, [a, b, c, np.int32(1000)])
    np.testing.assert_array_equal(c, a + b)
    assert stats["global_load_bytes"] == 8000
    assert stats["global_store_bytes"] == 4000
    assert stats["flops"] == 1000


def test_shared_memory_reduction(basic, rng):
    x, sums = rng.standard_normal((4, 256)).astype(np.float32), np.zeros(4, np.float32)
    stats = basic.launch("smem_reduce", 4, 256, [x, sums], shared=1024)
    np.testing.assert_allclose(sums, x.sum(1, dtype=float), atol=2e-5)
    assert stats["barriers"] == 4 * 9
    assert stats["shared_wavefronts"] == stats["shared_wavefronts_ideal"]  # no bank conflicts


@pytest.mark.parametrize("order", [0, 1, 7])
def test_shuffles_votes_and_atomics(basic, rng, order):
    x = rng.standard_normal((8, 32)).astype(np.float32)
    total, ballots = np.zeros(1, np.float32), np.zeros(8, np.uint32)
    mixed, scan = np.zeros(258, np.int32), np.zeros((8, 32), np.float32)
    basic.launch("shfl_atomic", 2, 128, [x, total, ballots, mixed, scan], order=order)
    np.testing.assert_allclose(total, x.sum(dtype=float), atol=1e-4)
    np.testing.assert_array_equal(ballots, np.packbits(x > 0, bitorder="little").view(np.uint32))
    np.testing.assert_allclose(scan, x.cumsum(1, dtype=float), atol=1e-5)
    thread = np.arange(256)
    lane, warp = thread % 32, thread // 32 * 32
    down = np.where(lane + 3 < 32, thread + 3, thread)
    votes = np.repeat((x > 2).any(1), 32) + 2
    np.testing.assert_array_equal(mixed[:256], warp + lane * 7 % 32 + 2 * down + votes)
    assert mixed[256:].tolist() == [256, 255]


def test_half_precision_and_special_functions(basic, rng):
    n = 512
    (a, wide_a), (b, wide_b) = normal_bfloat16(rng, n), normal_bfloat16(rng, n)
    c, f = np.zeros(n, np.uint16), np.zeros(n, np.float32)
    h, hc = rng.standard_normal(n).astype(np.float16), np.zeros(n, np.float16)
    basic.launch("bf16_ops", 2, 128, [a, b, c, f, h, hc, np.int32(n)])

    def rounded(x):
        return from_bfloat16(bfloat16(x)).astype(float)

    z = rounded(wide_a * wide_b + rounded(wide_a + wide_b))
    np.testing.assert_array_equal(from_bfloat16(c), z)
    even, odd = z[::2], z[1::2]
    np.testing.assert_allclose(f[::2], np.exp(even * 0.1), rtol=1e-6)
    special = np.tanh(odd) + np.log(1 + abs(even)) + 1 / np.sqrt(1 + odd * odd)
    np.testing.assert_allclose(f[1::2], special, atol=1e-6)
    np.testing.assert_allclose(hc.astype(float), h.astype(float) ** 2 + 0.5, rtol=5e-4)


def test_divergent_loops_and_switch(basic, rng):
    def collatz(v):
        c = 0
        while v != 1 and c < 200:
            v = 3 * v + 1 if v & 1 else v // 2
            c += 1
        return [c + 10, c * 2, c - 7, c ^ 5, -c][c % 5]

    x, y = rng.integers(1, 10000, 200).astype(np.int32), np.zeros(200, np.int32)
    stats = basic.launch("diverge", 2, 128, [x, y, np.int32(200)])
    assert y.tolist() == [collatz(int(v)) for v in x]
    assert stats["divergences"] > 0


def test_wmma_bf16(tensor_cores, rng):
    (a, wide_a), (b, wide_b) = normal_bfloat16(rng, 64, 64), normal_bfloat16(rng, 64, 64)
    c = np.zeros((64, 64), np.float32)
    stats = tensor_cores.launch("wmma_bf16_64", 1, 128, [a, b, c])
    np.testing.assert_allclose(c, 2 * wide_a @ wide_b, atol=3e-5)
    assert stats["mma_flops"] == 2 * 64**3


def test_wmma_f16(tensor_cores, rng):
    a, b = rng.standard_normal((2, 16, 16)).astype(np.float16)
    c = rng.standard_normal((16, 16)).astype(np.float32)
    expected = c + a.astype(float) @ b.astype(float).T
    tensor_cores.launch("wmma_f16_16", 1, 32, [a, b, c])
    np.testing.assert_allclose(c, expected, atol=1e-5)


def test_wmma_tf32(tensor_cores, rng):
    a, b = rng.standard_normal((2, 16, 8)).astype(np.float32)
    c = np.zeros((16, 16), np.float32)
    tensor_cores.launch("wmma_tf32", 1, 32, [a, b, c])
    exact = a.astype(float) @ b.astype(float).T
    np.testing.assert_allclose(c.T, exact, atol=1e-2)
    assert abs(c.T - exact).max() > 1e-5  # inputs lose bits


def test_mma_ldmatrix_and_cp_async(tensor_cores, rng):
    (a, wide_a), (b, wide_b) = normal_bfloat16(rng, 16, 16), normal_bfloat16(rng, 16, 8)
    c = np.zeros((16, 8), np.float32)
    stats = tensor_cores.launch("mma_bf16_m16n8k16", 1, 32, [a, b, c])
    np.testing.assert_allclose(c, wide_a @ wide_b, atol=1e-5)
    assert stats["mma_flops"] == 2 * 16 * 8 * 16


@pytest.mark.parametrize(
    ("kernel", "threads", "complaint"),
    [
        ("race_sh", 128, "shared memory read before any write"),
        ("race_war", 128, "shared race: read of what another warp wrote"),
        ("intra_warp", 32, "shared hazard in a warp: read"),
        ("oob", 128, "global store out of bounds"),
        ("div_bar", 32, "divergent barrier"),
        ("div_bar2", 64, "barrier while other warps of the block have exited"),
        ("cp_nowait", 32, "cp.async to it is in flight"),
        ("uninit", 64, "read before any write"),
        ("shfl_div", 32, "have not converged"),
        ("misalign", 32, "misaligned global load"),
    ],
)
def test_wrong_kernels_are_reported(rng, kernel, threads, complaint):
    x = rng.standard_normal(512).astype(np.float32)
    y = np.zeros(64 if kernel == "misalign" else threads, np.float32)
    arguments = [y] if kernel in ("div_bar", "div_bar2", "uninit") else [x, y]
    arguments += [np.int32(threads)] * (kernel == "oob")
    with pytest.raises(PtxError, match=complaint):
        module("wrong", "80").launch(kernel, 1, threads, arguments)


def test_the_right_kernel_among_the_wrong_is_not_reported(rng):
    x, y = rng.standard_normal(32).astype(np.float32), np.zeros(32, np.float32)
    stats = module("wrong", "80").launch("ok_warp", 1, 32, [x, y])
    assert not stats["messages"]
    np.testing.assert_array_equal(y, x[::-1])


# ---- the stand-in runtime ----


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.fixture
def host():
    """The functions of launches.cu, and the runtime with nothing launched yet."""
    runtime = load()
    sources = [KERNELS / "launches.cu"]
    library = ctypes.CDLL(str(build.cuda_library("launches", sources, ["80", "90"])))
    library.set_offset.argtypes = [ctypes.c_float]
    assert library.set_offset(0) == 0
    runtime.reset()
    return library, runtime


def test_launches_are_recorded(host):
    library, runtime = host
    x, y = runtime.array(np.arange(300, dtype=np.float32)), runtime.array(np.ones(300, np.float32))
    assert library.set_offset(0.5) == 0
    assert library.add_float(pointer(y), pointer(x), 300, None) == 0
    np.testing.assert_array_equal(y, np.arange(300) + 1.5)
    (launch,) = runtime.launches()
    assert launch.name == "void add<float>(float*, float const*, int)"
    assert (launch.grid, launch.block, launch.stream) == ([3, 1, 1], [128, 1, 1], 0)
    assert launch.statistics["flops"] == 600
    assert runtime.calls()["cudaLaunchKernel"] == 1


@pytest.mark.parametrize(("cc", "target"), [(75, None), (80, 80), (86, 80), (90, 90), (120, 90)])
def test_the_device_runs_the_latest_code_that_it_can(host, cc, target):
    library, runtime = host
    x, y = runtime.array(np.ones(5)), runtime.array(np.ones(5))
    with runtime.settings(cc=cc):
        status = library.add_double(pointer(y), pointer(x), 5, None)
    assert status == (NO_KERNEL_IMAGE if target is None else 0)
    assert [launch.target for launch in runtime.launches()] == [target] * (target is not None)
    assert y.tolist() == [1 if target is None else 2] * 5


def test_device_and_stream_of_a_launch(host):
    library, runtime = host
    with runtime.settings(devices=2), runtime.device(1):
        stream = runtime.stream()
        x, y = runtime.array(np.ones(5)), runtime.array(np.ones(5))
        assert library.add_double(pointer(y), pointer(x), 5, ctypes.c_void_p(stream)) == 0
        (launch,) = runtime.launches()
        assert (launch.device, launch.stream) == (1, stream)
        with runtime.device(0):  # neither the stream nor the memory is this device's
            assert library.add_double(pointer(y), pointer(x), 5, ctypes.c_void_p(stream)) == 400
            assert library.add_double(pointer(y), pointer(x), 5, None) == LAUNCH_FAILURE
    assert "out of bounds" in runtime.launches()[-1].messages[0]


def test_errors_of_a_launch_are_told(host):
    library, runtime = host
    x, y = runtime.array(np.ones(10)), runtime.array(np.ones(9))
    assert library.add_double(pointer(y), pointer(x), 10, None) == LAUNCH_FAILURE
    (launch,) = runtime.launches()
    assert launch.status == LAUNCH_FAILURE
    assert "8 bytes at address" in launch.messages[0]
    assert "byte 72 of a buffer of 72 bytes" in launch.messages[0]


def test_memory_of_the_host_can_be_lent(host):
    library, runtime = host
    x, y = np.ones(10), np.ones(10)
    with runtime.lend(x.ctypes.data, x.nbytes), runtime.lend(y.ctypes.data, y.nbytes):
        assert library.add_double(pointer(y), pointer(x), 10, None) == 0
    assert library.add_double(pointer(y), pointer(x), 10, None) == LAUNCH_FAILURE


def test_footprint_counts_sectors_once(host):
    library, runtime = host
    x, y = runtime.array(np.ones(32, np.float32)), runtime.empty(32, np.float32)
    with runtime.settings(footprint=1):
        assert library.read_twice_float(pointer(y), pointer(x)) == 0
    (launch,) = runtime.launches()
    assert launch.statistics["global_load_sectors"] == 8
    assert launch.statistics["footprint_read_sectors"] == 4
    assert launch.statistics["footprint_written_sectors"] == 4


def test_dynamic_shared_memory_must_be_asked_for(host):
    library, runtime = host
    y = runtime.empty(256, np.float32)
    assert library.dynamic_float(pointer(y), 0) == 1
    assert library.dynamic_float(pointer(y), 1) == 0
    np.testing.assert_array_equal(y, np.arange(256))


def test_graph_capture(host):
    library, runtime = host
    x, y = runtime.array(np.ones(40, np.float32)), runtime.array(np.zeros(40, np.float32))
    refused = library.add_by_graph(pointer(y), pointer(x), 40, 3)
    assert refused == 900
    assert y.tolist() == [3] * 40
    assert len(runtime.launches()) == 3
