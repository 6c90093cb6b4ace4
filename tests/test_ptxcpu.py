"""The interpreter of PTX that the tests of the CUDA kernels stand on: right kernels compute what
they should, and wrong ones are reported."""

import ctypes
import itertools
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from ptxcpu import build, sass
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


# ---- instruction by instruction ----


@pytest.fixture(params=ARCHITECTURES)
def instructions(request):
    return module("instructions", request.param)


def test_mma_tf32(instructions, rng):
    a, b = rng.standard_normal((16, 8)), rng.standard_normal((8, 8))
    c = np.zeros((16, 8), np.float32)
    instructions.launch("mma_tf32_k8", 1, 32, [a.astype(np.float32), b.astype(np.float32), c])
    np.testing.assert_allclose(c, a @ b, atol=1e-2)
    assert abs(c - a @ b).max() > 1e-5  # inputs lose bits


def test_mma_f16(instructions, rng):
    a, b = rng.standard_normal((16, 16)).astype(np.float16), np.zeros((16, 8), np.float16)
    b[:] = rng.standard_normal((16, 8))
    c = np.zeros((16, 8), np.float32)
    instructions.launch("mma_f16_k16", 1, 32, [a, b, c])
    np.testing.assert_allclose(c, a.astype(float) @ b.astype(float), atol=1e-5)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("filled", [0, 3, 16])
def test_cp_async_fills_with_zeros(instructions, rng, size, filled):
    x, y = rng.integers(1, 100, (64, size), np.uint8), np.zeros((64, size), np.uint8)
    filled = min(filled, size)
    stats = instructions.launch(f"copy{size}", 1, 32, [x, y, np.int32(filled)])
    expected = np.where(np.arange(size) < filled, x, 0)
    np.testing.assert_array_equal(y, expected)
    assert stats["global_load_bytes"] == (64 * size if filled else 0)


@pytest.mark.parametrize("order", [0, 1, 5, 6])
def test_named_barriers(instructions, rng, order):
    x, y = rng.standard_normal((5, 64)).astype(np.float32), np.zeros((5, 64), np.float32)
    arguments = [x, y, np.int32(5)]
    instructions.launch("produce_and_consume", 1, 128, arguments, order=order)
    np.testing.assert_array_equal(y, x[:, ::-1] + x[:, :1])
    with pytest.raises(PtxError, match="shared race"):
        instructions.launch("produce_too_early", 1, 128, arguments, order=order)


@pytest.mark.parametrize("order", [0, 1, 5, 6])
def test_cp_async_over_what_is_read(instructions, rng, order):
    x, y = rng.standard_normal((2, 128)).astype(np.float32), np.zeros((2, 128), np.float32)
    with pytest.raises(PtxError, match="shared race"):
        instructions.launch("copy_over_what_is_read", 1, 128, [x, y], order=order)


@pytest.mark.parametrize("order", [0, 1, 5, 6])
def test_double_buffered_cp_async(instructions, rng, order):
    x, y = rng.standard_normal((5, 512)).astype(np.float32), np.zeros((5, 512), np.float32)
    instructions.launch("double_buffered", 1, 128, [x, y, np.int32(5)], order=order)
    np.testing.assert_array_equal(y, x[:, ::-1] + x[:, :1])


def test_barriers_that_reduce(instructions, rng):
    x, y = (rng.random((6, 96)) < 0.5).astype(np.int32), np.zeros((6, 3), np.int32)
    x[0], x[1] = 0, 7
    instructions.launch("block_votes", 6, 96, [x, y])
    holds = x != 0
    np.testing.assert_array_equal(y, np.stack([holds.sum(1), holds.all(1), holds.any(1)], 1))


def test_structures_of_parameters(instructions, rng):
    values = rng.standard_normal(16).astype(np.float32)
    rows = rng.standard_normal((2, 200)).astype(np.float32)
    table = np.int64(3).tobytes() + values.tobytes()
    table += b"".join(row.ctypes.data.to_bytes(8, "little") for row in rows)
    y = np.zeros(64, np.float32)
    t = np.arange(64)
    instructions.launch("parameter_address", 1, 64, [table, y])
    np.testing.assert_array_equal(y, values[t % 16])
    with pytest.raises(PtxError, match="out of bounds"):  # the rows are not arguments
        instructions.launch("parameter_structure", 1, 64, [table, y])
    instructions.launch("parameter_structure", 1, 64, [table, y], buffers=[rows])
    np.testing.assert_array_equal(y, values[t % 16] + rows[t & 1, 3 * t])


def test_calls(instructions, rng):
    x, y = rng.random(64).astype(np.float32), np.zeros(64)
    instructions.launch("calls", 1, 64, [x, y])
    geometric = [sum(float(v) ** k for k in range(t)) for t, v in enumerate(x)]
    expected = np.where(np.arange(64) % 3, 2 * x.astype(float) + 1, geometric)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_integers(instructions, rng):
    n = 500
    a = rng.integers(-(2**63), 2**63, n) >> rng.integers(0, 60, n)
    b = rng.integers(-(2**63), 2**63, n) >> rng.integers(0, 63, n)
    a[:3], b[:3] = (-(2**63), -7, 0), (-1, 2, 0)
    y = np.zeros((12, n), np.int64)
    instructions.launch("integers", 4, 128, [a, b, y, np.int32(n)])

    def signed(x, bits=64):
        x &= 2**bits - 1
        return x - 2**bits if x >> (bits - 1) else x

    def truncated(p, q):
        return abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)

    for i, (p, q) in enumerate(zip(a.tolist(), b.tolist())):
        pu, qu, u, v = p % 2**64, q % 2**64, p % 2**32, q % 2**32
        data = u.to_bytes(4, "little") + v.to_bytes(4, "little")
        shift = q & 31
        clamped = min(q & 63, 32)
        # __funnelshift_l(low, high, n) and __funnelshift_rc(low, high, n)
        funnels = (((v << 32 | u) << shift) >> 32) % 2**32
        funnels += ((v << 32 | u) >> clamped) % 2**32
        dot = 7 + sum(signed(x, 8) * signed(y, 8) for x, y in zip(data[:4], data[4:]))
        first_one = (u & -u).bit_length()
        expected = [
            signed(truncated(p, q)) if q else 0,
            p - truncated(p, q) * q if q else 0,
            signed(pu // qu) if q else 0,
            p * q >> 64,
            signed(pu * qu >> 64),
            int.from_bytes(bytes(data[j] for j in (2, 4, 1, 5)), "little"),
            (u >> 5 & 0x7F) | ((u & 0xFFFFF00F) | (v & 0xFF) << 4) << 16,
            64 - pu.bit_length() + 100 * qu.bit_count() + 10000 * first_one,
            signed(int(f"{pu:064b}"[::-1], 2)),
            funnels,
            signed(signed(u, 32) >> (v & 31)) + min(signed(u, 32), signed(v, 32)),
            signed(dot, 32),
        ]
        assert y[:, i].tolist() == expected, (p, q)


def test_doubles(instructions, rng):
    n = 300
    a, b = rng.standard_normal((2, n)) * 5
    y = np.zeros((14, n))
    instructions.launch("doubles", 3, 128, [a, b, y, np.int32(n)])
    fused = [float(Fraction(p) * Fraction(q) + Fraction(p)) for p, q in zip(a, b)]
    root = np.sqrt(abs(a))
    exact = [a + b, a - b, a * b, a / b, fused, root]
    for got, expected in zip(y, exact):
        np.testing.assert_array_equal(got, expected)
    approximate = [np.exp(a), np.log(abs(a)), 1 / b, 1 / root]
    approximate += [np.minimum(a, b), np.maximum(a, b), np.floor(a), np.tanh(a)]
    np.testing.assert_allclose(y[6:], approximate, rtol=1e-14)


def test_floats(instructions, rng):
    n = 300
    a, b = (rng.standard_normal((2, n)) * 5).astype(np.float32)
    y = np.zeros((14, n), np.float32)
    instructions.launch("floats", 3, 128, [a, b, y, np.int32(n)])
    p, q = a.astype(float), b.astype(float)
    rounded = from_bfloat16(bfloat16(a)) + b.astype(np.float16).astype(np.float32)
    expected = [p + q, p / q, p / q, 2**p, np.exp(p), np.exp(p), 2**q, np.log1p(abs(p))]
    expected += [1 / np.sqrt(abs(p)), p.clip(0, 1), np.floor(p) + np.rint(q)]
    expected += [np.trunc(p) + np.trunc(abs(q)), rounded, np.copysign(q, p)]
    np.testing.assert_allclose(y, expected, rtol=5e-6)


def test_bfloat16_pairs(instructions, rng):
    n = 30
    (a, p), (b, q) = normal_bfloat16(rng, n, 2), normal_bfloat16(rng, n, 2)
    y = np.zeros((8, n, 2), np.uint16)
    instructions.launch("bfloat16_pairs", 1, 32, [a, b, y, np.int32(n)])
    constant = np.broadcast_to([1.001, -3], (n, 2))
    mixed = np.stack([p[:, 1], q[:, 0]], 1)
    expected = [p + q, p - q, p * q, p * q + q, np.maximum(p, q), -p, constant, mixed]
    np.testing.assert_array_equal(y, bfloat16(np.array(expected)))


def test_cache_hints(instructions, rng):
    x, y = rng.standard_normal((32, 4)).astype(np.float32), np.zeros((32, 4), np.float32)
    bytes_ = np.arange(32, dtype=np.uint8)
    instructions.launch("cache_hints", 1, 32, [x, y, bytes_])
    np.testing.assert_array_equal(y[:, 1:], x[:, 1:])
    np.testing.assert_array_equal(y[:, 0], x[:, 0] + (x[:, 0] + x[:, 3]))
    np.testing.assert_array_equal(bytes_, np.arange(250, 282) % 256)


def test_local_memory(instructions, rng):
    x, y = rng.integers(0, 100, (32, 16)).astype(np.int32), np.zeros(32, np.int32)
    stats = instructions.launch("local_array", 1, 32, [x, y])
    for t in range(32):
        values = x[t].astype(int)
        for i in range(16):
            values[x[0, i] & 15] += i
        total = 0
        for i in range(16):
            total = total * 3 + values[i * t & 15]
        assert y[t] == total
    assert stats["local_requests"] > 0


def test_shuffles_of_doubles_and_reductions(instructions, rng):
    x, y = rng.standard_normal(32), np.zeros((2, 32))
    instructions.launch("shuffle_doubles", 1, 32, [x, y])
    t = np.arange(32)
    np.testing.assert_array_equal(y, [x[t % 4 * 8 + t // 4], x[t ^ 5]])
    v, z = rng.integers(-50, 50, 32).astype(np.int32), np.zeros((3, 32), np.int32)
    instructions.launch("warp_reductions", 1, 32, [v, z])
    same = ((v & 3)[:, None] == (v & 3)[None]).astype(np.int64) @ (1 << np.arange(32))
    np.testing.assert_array_equal(z[0], np.full(32, v.sum()))
    np.testing.assert_array_equal(z[1], np.full(32, v.min()))
    np.testing.assert_array_equal(z[2].view(np.uint32), same.astype(np.uint32))


# ---- what accesses to shared memory cost ----


def test_wavefronts_of_shared_memory():
    """32 banks of 4 bytes serve 128 bytes a cycle: by hand."""
    kernels, memory = module("shared", "80"), np.zeros((32, 4), np.uint32)
    for kernel, stride, wavefronts, ideal in [
        ("load4", 4, 1, 1),
        ("load4", 8, 2, 1),  # lanes i and i + 16 want the same bank
        ("load4", 128, 32, 1),  # all lanes do
        ("load4", 132, 1, 1),  # rows of 33 words
        ("load4", 0, 1, 1),  # one word for all
        ("load2", 2, 1, 1),  # a word for two lanes
        ("load2", 64, 16, 1),  # two banks
        ("store4", 4, 1, 1),
        ("store4", 12, 1, 1),  # an odd number of words
        ("store4", 128, 32, 1),
        ("load8", 8, 2, 2),  # half a warp at a time
        ("load8", 16, 4, 2),
        ("load16", 16, 4, 4),  # a quarter of a warp at a time
        ("load16", 32, 8, 4),
        ("load16", 0, 4, 4),
        ("load_matrices", 16, 4, 4),  # one 8x8 matrix at a time
        ("load_matrices", 144, 4, 4),
        ("load_matrices", 128, 32, 4),
        ("copy16", 16, 4, 4),
        ("copy16", 64, 16, 4),
    ]:
        arguments = [memory, np.int32(stride)]
        stats = kernels.launch(kernel, 1, 32, arguments, shared=31 * 144 + 16, check=0)
        found = stats["shared_wavefronts"], stats["shared_wavefronts_ideal"]
        assert found == (wavefronts, ideal), (kernel, stride)
        assert stats["shared_requests"] == (4 if kernel == "load_matrices" else 1)


# ---- machine code ----

needs_disassembler = pytest.mark.skipif(
    not (build.find_tool("nvdisasm") and build.find_tool("cuobjdump")),
    reason="needs nvdisasm and cuobjdump: pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump",
)


@needs_disassembler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code_of_a_source(arch):
    found = sass.compile_and_inspect(KERNELS / "tensor_cores.cu", arch, ["--use_fast_math"])
    kernels = {kernel.name: kernel for kernel in found}
    mma, wmma = kernels["mma_bf16_m16n8k16"], kernels["wmma_bf16_64"]
    assert mma.arch == wmma.arch == arch
    assert (mma.count("LDSM"), mma.count("HMMA"), mma.count("LDGSTS.128")) == (2, 1, 2)
    assert (mma.spill_bytes, mma.stack_bytes, mma.shared_bytes) == (0, 0, 1024)
    assert (wmma.count("LDG.128"), wmma.count("LD") > 0) == (2, True)  # fragments: generic loads
    assert wmma.shared_bytes == 18432
    assert not mma.loops
    loop = wmma.main_loop
    assert loop.count("LDG.128") == 2
    assert 2 * loop.issue_cycles >= len(loop.instructions) > 10
    assert loop.waits > 0


@needs_disassembler
def test_spills_are_seen():
    flags = ["-maxrregcount=32"]
    kernels = sass.compile_and_inspect(KERNELS / "tensor_cores.cu", "80", flags)
    (spilled,) = [kernel for kernel in kernels if kernel.name == "wmma_bf16_64"]
    assert spilled.registers == 32
    assert spilled.spill_bytes > 0
    assert spilled.stack_bytes > 0
    assert spilled.count("STL") > 0


@needs_disassembler
def test_machine_code_of_a_library():
    flags = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    library = build.cuda_library("machine_code", [KERNELS / "launches.cu"], [], flags)
    found = {(kernel.arch, kernel.name) for kernel in sass.inspect(library)}
    for arch in ARCHITECTURES:
        assert (arch, "void add<float>(float*, float const*, int)") in found
        assert (arch, "void add<double>(double*, double const*, int)") in found
        assert {kernel.arch for kernel in sass.inspect(library, arch)} == {arch}


def test_occupancy_is_that_of_cuda():
    source = build.HERE / "occupancy.cpp"
    command = ["g++", "-O1", f"-I{build.toolkit() / 'include'}", source]
    folder = build.cached(
        "occupancy", command, [source], lambda to: build.run([*command, "-o", to / "program"])
    )
    threads, registers, shared = (32, 64, 96, 256, 1024), (16, 40, 96, 168, 255), (0, 1000, 40000)
    cases = [
        (arch, *case)
        for arch in sass.MULTIPROCESSORS
        for case in itertools.product(threads, registers, shared)
    ]
    lines = []
    for arch, t, r, s in cases:
        most_threads, _, most_shared = sass.MULTIPROCESSORS[arch]
        lines.append(
            f"{arch[:-1]} {arch[-1]} {most_threads} {most_shared} {t} {r} {s // 2} {s // 2}"
        )
    result = subprocess.run(
        [folder / "program"], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    ours = [sass.occupancy(*case).blocks for case in cases]
    assert ours == list(map(int, result.stdout.split()))
    assert 0 in ours  # too many registers
    assert len(set(ours)) > 10


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
