"""The C interface by itself: NumPy arrays as DLTensors through ctypes, no torch operator."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from dlpack import K_CPU, K_CUDA, PARALLEL_FOR, Context, DLTensor, WkvInputs, int64s
from samples import random_call

import torch_rwkv6

LIBRARY = Path(torch_rwkv6.__file__).with_name("librwkv6.so")
CODES = {"f": 2, "i": 0}


@pytest.fixture(scope="module")
def library():
    lib = ctypes.CDLL(str(LIBRARY))
    for function in (lib.rwkv6_wkv_forward, lib.rwkv6_wkv_backward, lib.rwkv6_wkv_update):
        function.restype = ctypes.c_char_p
    lib.rwkv6_cpu_isa.restype = ctypes.c_char_p
    return lib


def dl(x: np.ndarray | None, *, strides=True, offset=0, **changes):
    """A pointer to a DLTensor of x's memory, or NULL."""
    if x is None:
        return None
    shape, steps = int64s(x.shape), int64s([s // x.itemsize for s in x.strides])
    tensor = DLTensor(
        x.ctypes.data - offset, K_CPU, 0, x.ndim, CODES[x.dtype.kind], x.itemsize * 8, 1,
        shape, steps if strides else None, offset,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(tensor, name, value)
    return ctypes.pointer(tensor)


def wkv_inputs(tensors):
    """r, k, v, w, u and initial_state, or the first of them."""
    return ctypes.byref(WkvInputs(*tensors))


def arrays(**options):
    call = random_call(**({"B": 2, "T": 6, "H": 2, "N": 5, "states": 2} | options))
    return [x.numpy() for x in call.floats()]


@pytest.mark.parametrize("strides", [True, False], ids=["strides", "compact"])
def test_forward_on_numpy_arrays(library, strides):
    inputs = arrays()
    y, state = np.empty_like(inputs[0]), np.empty_like(inputs[5])
    given = wkv_inputs(dl(x, strides=strides) for x in inputs)
    error = library.rwkv6_wkv_forward(None, given, dl(y), dl(state), None)
    assert error is None
    expected_y, expected_state = oracle.wkv(*(x.astype(np.float64) for x in inputs))
    np.testing.assert_allclose(y, expected_y, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(state, expected_state, rtol=2e-5, atol=2e-5)


def test_byte_offset(library):
    inputs = arrays()
    y, state = np.empty_like(inputs[0]), np.empty_like(inputs[5])
    other_y, other_state = np.empty_like(y), np.empty_like(state)
    library.rwkv6_wkv_forward(None, wkv_inputs(map(dl, inputs)), dl(y), dl(state), None)
    shifted = wkv_inputs(dl(x, offset=4096) for x in inputs)
    library.rwkv6_wkv_forward(None, shifted, dl(other_y), dl(other_state), None)
    assert np.array_equal(y, other_y)
    assert np.array_equal(state, other_state)


def test_work_is_cut_for_the_callers_threads_also_within_one_head(library):
    inputs = arrays(B=1, T=100, H=1, N=256, states=1)
    pieces = []

    def parallel_for(pool, n, body, data):
        pieces.append(n)
        for i in reversed(range(n)):  # any order
            body(data, i, i + 1)

    context = Context(parallel_for=PARALLEL_FOR(parallel_for), num_threads=4)
    y, state = np.empty_like(inputs[0]), np.empty_like(inputs[5])
    expected_y, expected_state = np.empty_like(y), np.empty_like(state)
    given = wkv_inputs(map(dl, inputs))
    library.rwkv6_wkv_forward(None, given, dl(expected_y), dl(expected_state), None)
    error = library.rwkv6_wkv_forward(ctypes.byref(context), given, dl(y), dl(state), None)
    assert error is None
    assert max(pieces) >= 4
    assert np.array_equal(y, expected_y)
    assert np.array_equal(state, expected_state)


# which argument of r, k, v, w, u, initial_state, y, final_state is changed, how, and the message
BAD = [
    (0, {"device_type": 7}, "r: expected a tensor on the CPU or a CUDA device, got DLPack device"),
    (0, {"device_type": K_CUDA}, "k: expected a tensor on CUDA device 0, got one on the CPU"),
    (
        3,
        {"device_type": K_CUDA, "device_id": 1},
        "w: expected a tensor on the CPU, got one on CUDA",
    ),
    (1, {"data": None}, "k: its data pointer is NULL"),
    (1, {"ndim": 3}, r"k: expected shape [2, 6, 2, 5] (-1: any), got [2, 6, 2]"),
    (2, {"bits": 16}, "v: expected float32, got float16"),
    (2, {"lanes": 4}, "v: expected float64, float32, bfloat16 or float16"),
    (3, {"code": 1}, "w: expected float64, float32, bfloat16 or float16"),
    (4, {"ndim": 1}, "u: expected shape [2, 5]"),
    (5, {"bits": 64}, "initial_state: expected float32, got float64"),
    (6, {"bits": 64}, "y: expected float32, got float64"),
    (7, {"ndim": 2}, "final_state: expected shape [2, 2, 5, 5]"),
]


@pytest.mark.parametrize(("index", "change", "message"), BAD)
def test_messages_and_untouched_outputs(library, index, change, message):
    inputs = arrays()
    outputs = [np.full_like(inputs[0], 7), np.full_like(inputs[5], 7)]
    tensors = [dl(x, **(change if i == index else {})) for i, x in enumerate(inputs + outputs)]
    error = library.rwkv6_wkv_forward(None, wkv_inputs(tensors[:6]), *tensors[6:], None)
    assert error is not None
    assert message in error.decode()
    assert all((x == 7).all() for x in outputs)


def test_a_call_on_a_gpu_that_cannot_be_made_says_why(library):
    """No CUDA kernels, no GPU or no stream, whatever this machine lacks first."""
    tensors = [dl(x, device_type=K_CUDA) for x in arrays()]
    outputs = [dl(x, device_type=K_CUDA) for x in (arrays()[0], arrays()[5])]
    error = library.rwkv6_wkv_forward(None, wkv_inputs(tensors), *outputs, None).decode()
    assert any(s in error for s in ("without CUDA kernels", "cudaGetDevice: ", "context: "))


@pytest.mark.parametrize("missing", range(5))
def test_null_arguments(library, missing):
    inputs = arrays()
    outputs = [np.empty_like(inputs[0]), np.empty_like(inputs[5])]
    tensors = [None if i == missing else dl(x) for i, x in enumerate(inputs)]
    error = library.rwkv6_wkv_forward(None, wkv_inputs(tensors), *map(dl, outputs), None)
    assert error.decode() == f"{'rkvwu'[missing]}: required, got NULL"


def test_outputs_that_overlap_themselves_are_refused(library):
    inputs = arrays()
    y = np.lib.stride_tricks.as_strided(np.empty(1000, np.float32), inputs[0].shape, (0, 40, 20, 4))
    state = np.empty_like(inputs[5])
    error = library.rwkv6_wkv_forward(None, wkv_inputs(map(dl, inputs)), dl(y), dl(state), None)
    assert b"y: it is written to, but its elements overlap" in error


def test_structs_are_required(library):
    y, state = np.empty((1, 1, 1, 1), np.float32), np.empty((1, 1, 1, 1), np.float32)
    for function, last in (
        (library.rwkv6_wkv_forward, [dl(y), dl(state), None]),
        (library.rwkv6_wkv_update, [dl(state), dl(y)]),
        (library.rwkv6_wkv_backward, [None, None, None, None]),
    ):
        assert function(None, None, *last) == b"inputs: required, got NULL"
    given = wkv_inputs([None] * 5)
    assert library.rwkv6_wkv_backward(None, given, None, None, None, None) == (
        b"gradients: required, got NULL"
    )


def test_an_update_has_no_initial_state(library):
    inputs = arrays()
    state, y = inputs[5].copy(), np.empty_like(inputs[0])
    error = library.rwkv6_wkv_update(None, wkv_inputs(map(dl, inputs)), dl(state), dl(y))
    assert error == b"initial_state: expected NULL, an update starts from state"


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 2, 5), "[2, 2, 5]"), ((2, 2, 4), "[2, 2, 5]"), ((2, 4), "[2, 5]")]
)
def test_wrong_shapes_of_u(library, shape, expected):
    """[H, N], or [B, H, N] with a u of its own for every batch row."""
    inputs = arrays()
    inputs[4] = np.zeros(shape, np.float32)
    y, state = np.full_like(inputs[0], 7), np.full_like(inputs[5], 7)
    error = library.rwkv6_wkv_forward(None, wkv_inputs(map(dl, inputs)), dl(y), dl(state), None)
    assert error.decode() == f"u: expected shape {expected} (-1: any), got {list(shape)}"
    assert (y == 7).all()


@pytest.mark.memory
def test_64_bit_offsets(library):
    """Row 2**31 and more elements into an array: read and written where it lies."""
    N, far = 4, 2**31 + 64  # of float32: 17 GB of addresses, of which a few pages are touched
    span = np.lib.stride_tricks.as_strided
    sparse = np.zeros(2 * far, np.float32)  # untouched pages cost nothing
    rng = np.random.default_rng(0)
    small = [rng.standard_normal((1, 2, 1, N)).astype(np.float32) for _ in range(4)]
    u, state = rng.standard_normal((1, N)).astype(np.float32), np.empty((1, 1, N, N), np.float32)

    def spread(x, base):
        view = span(sparse[base:], x.shape, (4, 4 * far, 4, 4))
        view[...] = x
        return view

    wide = [spread(x, i * 16) for i, x in enumerate(small)]
    y = span(sparse[128:], (1, 2, 1, N), (4, 4 * (far - 1), 4, 4))
    expected_y, expected_state = oracle.wkv(
        *(x.astype(np.float64) for x in small), u.astype(np.float64), np.zeros((1, 1, N, N))
    )
    given = wkv_inputs([*map(dl, wide), dl(u)])
    assert library.rwkv6_wkv_forward(None, given, dl(y), dl(state), None) is None
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, expected_state, rtol=1e-5, atol=1e-5)


ON_ONE_ISA = """
import sys
sys.path.insert(0, sys.argv[1])
import ctypes, torch, torch_rwkv6
from samples import FLOAT_DTYPES, random_call, relative_rms
from torch_rwkv6 import reference
lib = ctypes.CDLL(sys.argv[2])
lib.rwkv6_cpu_isa.restype = ctypes.c_char_p
for dtype in FLOAT_DTYPES:
    limit = {torch.float64: 1e-13, torch.float32: 5e-6}.get(dtype, 2.5e-3)
    for N in (1, 7, 16, 20, 64, 100):
        call = random_call(B=2, T=40, H=8, N=N, dtype=dtype, extreme=True, states=2).leaves()
        grads = call.grad_outputs()
        outputs = torch_rwkv6.wkv(*call.floats())
        found = [*outputs, *torch.autograd.grad(outputs, call.differentiable(), grads)]
        exact = call.double()
        expected = [
            *reference.wkv(*exact.args()),
            *reference.wkv_backward(*(g.double() for g in grads), *exact.args()),
        ]
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert relative_rms(a, b) <= (1.5 if N < 8 else 1) * limit, (dtype, N, i)
print(lib.rwkv6_cpu_isa().decode())
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_cpu(isa):
    result = subprocess.run(
        [sys.executable, "-c", ON_ONE_ISA, str(Path(__file__).parent), str(LIBRARY)],
        capture_output=True,
        text=True,
        env=os.environ | {"RWKV6_CPU_ISA": isa},
    )
    if "one that this CPU has" in result.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert result.stdout == f"{isa}\n", result.stderr


def test_links_no_framework_and_no_openmp():
    needed = subprocess.run(["ldd", str(LIBRARY)], capture_output=True, text=True).stdout
    assert not any(name in needed for name in ("torch", "c10", "python", "omp", "iomp"))


PRINT_ISA = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.rwkv6_cpu_isa.restype = ctypes.c_char_p
print(lib.rwkv6_cpu_isa().decode())
"""

# What Linux says of the processor, for the kernels of each instruction set.
FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "baseline": set(),
}


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="x86-64 Linux"
)
def test_the_best_instruction_set_of_the_processor_is_chosen():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    best = next(isa for isa, needed in FLAGS.items() if needed <= flags)
    environment = {name: x for name, x in os.environ.items() if name != "RWKV6_CPU_ISA"}
    result = subprocess.run(
        [sys.executable, "-c", PRINT_ISA, str(LIBRARY)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.stdout == f"{best}\n", result.stderr
