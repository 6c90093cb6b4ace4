"""Do the tests of the CUDA kernels see mistakes? Seeds them, one at a time, and runs some tests.

cd tests, then: python -m cuda.mutations [WORD ...]    those with one of the words in their name

The kernels are compiled in a copy, with only those instances of templates that the tests named
below run. Each defect has to make one of its tests fail; what noticed it is printed.
"""

import contextlib
import io
import multiprocessing
import shutil
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from . import gpu

COPY = gpu.ROOT / "build/mutations/tree"
PRISTINE = gpu.ROOT / "build/mutations/pristine"  # the copy once it is built
TESTS = gpu.ROOT / "tests/test_cuda_kernels.py"
LIMIT = 600  # seconds that tests may take

MORE_THAN_64 = (
    "    if (64 < job.N && job.N <= 128) return launch_{0}<T, 128>(launch, {1});\n",
    "  launch_{0}<T, 256>(launch, {1});\n",
)
DOUBLE = "{0}<double>(launch, job);"
# What the mutants do without, so that they compile in seconds: file, text, instead.
LEFT_OUT = [
    (
        "chunked.cuh",
        """    if (N == 64) return f(element, std::integral_constant<int, 64>());
    return f(element, std::integral_constant<int, 128>());
""",
        "",
    ),
    ("chunked.cuh", "dtype == DType::bf16 ? sized(Bf16()) : sized(F16());", "sized(Bf16());"),
    *(
        (f"wkv_{name}_recurrent.cu", text.format(name, arguments), instead)
        for name, arguments in (("forward", "job, walk"), ("backward", "job"))
        for text, instead in (*((text, "") for text in MORE_THAN_64), (DOUBLE, ";"))
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # in csrc/cuda
    text: str  # once in the file
    instead: str
    tests: str  # of tests/test_cuda_kernels.py, as for pytest -k


FORWARD, BACKWARD = "wkv_forward_chunked.cu", "wkv_backward_chunked.cu"
RECURRENT, RECURRENT_BACKWARD = "wkv_forward_recurrent.cu", "wkv_backward_recurrent.cu"
CHUNKED_17 = "test_accuracy and sm_80 and chunked-bfloat16-32-17"
CHUNKED_65 = "test_accuracy and sm_80 and chunked-bfloat16-32-65"
RECURRENT_17 = "test_accuracy and sm_80 and recurrent-float32-20-17"
RECURRENT_64 = "test_accuracy and sm_80 and recurrent-float32-64-17"  # several blocks a head
OPTIONS = "test_options and sm_80 and "
SEGMENTS = "test_segments and chunked-bfloat16-32"
RECURRENT_SEGMENTS = "test_segments and recurrent-float32-20"
KEPT_STATES = "test_kept_states and chunked-bfloat16-32"

MUTATIONS = [
    # barriers and waits
    Mutation(
        "forward, chunked: no wait for the staged rows",
        FORWARD, "    cp_async_wait<0>();\n", "", CHUNKED_17,
    ),
    Mutation(
        "forward, chunked: no barrier before the rows of all threads are read",
        FORWARD,
        "    }\n    __syncthreads();\n\n    for (int level = warp;",
        "    }\n\n    for (int level = warp;",
        CHUNKED_17,
    ),
    Mutation(
        "forward, chunked: the next chunk is staged over the current one",
        FORWARD, "stage_chunk(offset + kChunk, buffer ^ 1)", "stage_chunk(offset + kChunk, buffer)",
        CHUNKED_17,
    ),
    Mutation(
        "backward, chunked: no barrier before the levels' gradients are collected",
        BACKWARD,
        "    __syncthreads();\n\n    my = Quad",
        "\n    my = Quad",
        CHUNKED_17,
    ),
    Mutation(
        "backward, chunked: no __syncwarp before a level is overwritten",
        BACKWARD,
        "  __syncwarp();\n  store_tile<N>(rows, out, key);\n}\n\n// The same where",
        "  store_tile<N>(rows, out, key);\n}\n\n// The same where",
        CHUNKED_17,
    ),
    Mutation(
        "state walk: no barrier before the state's update",
        "segments.cu",
        "    __syncthreads();\n    update_state",
        "    update_state",
        SEGMENTS + " and plain",
    ),
    Mutation(
        "state sum: no barrier before the products",
        "state_sum.cu",
        "    __syncthreads();\n    // A few tokens",
        "    // A few tokens",
        RECURRENT_SEGMENTS + " and plain",
    ),
    Mutation(
        "forward, recurrent: no barrier behind the tile's arrival",
        RECURRENT,
        "    __syncthreads();  // the tile is there, and nobody needs the one before\n",
        "",
        RECURRENT_17,
    ),
    Mutation(
        "backward, recurrent: no __syncwarp before sums replace what they are made of",
        "recurrent_backward_rows.cuh",
        "    __syncwarp();  // everybody has read what was there\n",
        "",
        RECURRENT_17,
    ),
    # fragments, levels and edges
    Mutation(
        "chunked: a fragment's rows swapped",
        "chunk.cuh",
        "a[4] = {upper.x, lower.x, upper.y, lower.y}",
        "a[4] = {lower.x, upper.x, upper.y, lower.y}",
        CHUNKED_17,
    ),
    Mutation(
        "backward, chunked: a lane's row of ldmatrix off by four tokens",
        BACKWARD, "n / 2 + n % 2 * 4 + l / 16 * 8", "n / 2 + n % 2 * 4 + l / 16 * 4", CHUNKED_17,
    ),
    Mutation(
        "chunked: a level takes in its neighbour's pairs",
        "chunk.cuh", "(lane.g ^ column) >= bit", "(lane.g ^ column) > bit", CHUNKED_17,
    ),
    Mutation(
        "backward, chunked: wrong mask of a level",
        BACKWARD, "(row ^ column) >> level == 1", "(row & column) >> level == 1", CHUNKED_17,
    ),
    Mutation(
        "forward, chunked: a last chunk of one token forgotten",
        FORWARD, "offset < length; offset += kChunk", "offset + 1 < length; offset += kChunk",
        CHUNKED_17,
    ),
    Mutation(
        "chunked: rows beyond the end not zero",
        "chunk.cuh",
        "from, row < tokens ? 16 : 0);\n    if (wide",
        "from, 16);\n    if (wide",
        CHUNKED_17,
    ),
    Mutation(
        "backward, chunked: decays beyond the end not 1",
        BACKWARD,
        "    my.decays(w, at.decaying(first, job.grad_final.data));\n    my.share_products",
        "    my.decays(w, kChunk);\n    my.share_products",
        CHUNKED_17,
    ),
    Mutation(
        "chunked: a state's rows with 11 bits",
        "mma.cuh", "low = __float_as_uint(x - __uint_as_float(high));", "low = 0;", CHUNKED_17,
    ),
    # decays
    Mutation(
        "chunked: decay applied one token too early",
        "chunk.cuh",
        "before[t][i] = before[t - 1][i] * d[t - 1][i]",
        "before[t][i] = before[t - 1][i] * d[t][i]",
        CHUNKED_17,
    ),
    Mutation(
        "backward, chunked: a pair of quads left out of dw",
        BACKWARD, "if (my.quad == 2) crossing += shared.sums[2][3][my.key];", "", CHUNKED_17,
    ),
    Mutation(
        "recurrent: the decay's rate with too small a bound",
        "decay.cuh", "w = w > 88 ? 88 : w;", "w = w > 2 ? 2 : w;", RECURRENT_17,
    ),
    # states, segments, checkpoints
    Mutation(
        "segments: each starts where it should end",
        "segments.cu",
        "    end = s;\n    s = kept_of(change) * s + (change * s + added);\n",
        "    s = kept_of(change) * s + (change * s + added);\n    end = s;\n",
        SEGMENTS + " and plain",
    ),
    Mutation(
        "packed segments: each is the sequence's before",
        "place.cuh", "middle) <= segment ? low", "middle) < segment ? low",
        SEGMENTS + " and packed",
    ),
    Mutation(
        "state sum: a tile's decays left out of the segment's",
        "state_sum.cu",
        "all_change = change_of_product(all_change, change);",
        "all_change = change;",
        RECURRENT_SEGMENTS + " and plain",
    ),
    Mutation(
        "backward, recurrent: each segment ends as its sequence does",
        RECURRENT_BACKWARD,
        "  if (place.is_end())\n    load_matrix",
        "  if (true)\n    load_matrix",
        RECURRENT_SEGMENTS + " and plain",
    ),
    Mutation(
        "backward, recurrent: each segment starts as its sequence does",
        RECURRENT_BACKWARD,
        "  if (place.segment == 0)\n    load_matrix",
        "  if (true)\n    load_matrix",
        RECURRENT_SEGMENTS + " and packed",
    ),
    Mutation(
        "chain of sequences: only the first 32 are searched",
        "sum_states.cu",
        "for (; m < sequences.count; m += 32)", "for (; m < 32; m += 32)",
        "test_gradients_of_a_state_that_many_start_from and sm_80 and float32",
    ),
    Mutation(
        "a checkpoint every 256 tokens",
        "chunk.cuh",
        "token % kCheckpointTokens) return",
        "token % (2 * kCheckpointTokens)) return",
        KEPT_STATES,
    ),
    Mutation(
        "backward, chunked: a chunk meets its successor's state",
        BACKWARD,
        "return scratch(step.chunk());",
        "return scratch(step.chunk() > 1 ? step.chunk() - 1 : step.chunk());",
        CHUNKED_65,
    ),
    Mutation(
        "packed sequences share their checkpoints",
        "../job.h",
        "(begin + token) / kCheckpointTokens - 1",
        "token / kCheckpointTokens - 1",
        KEPT_STATES + " and packed",
    ),
    # around the kernels
    Mutation(
        "forward, recurrent: the tiles swapped",
        RECURRENT,
        "rows = tiles[tile % 2]",
        "rows = tiles[(tile + 1) % 2]",
        RECURRENT_17,
    ),
    Mutation(
        "recurrent: elements beyond the head size not zero",
        "load.cuh",
        "kSize; e++) pack.x[e] = T(0);",
        "kSize; e++) pack.x[e] = T(1);",
        RECURRENT_17,
    ),
    Mutation(
        "backward, recurrent: one block's part of dv left out",
        RECURRENT_BACKWARD,
        "for (int64_t p = 0; p < count; p++) sum += parts[p * size + at];",
        "for (int64_t p = 1; p < count; p++) sum += parts[p * size + at];",
        RECURRENT_64,
    ),
    Mutation(
        "gradient of u: the last sequence left out",
        "sum_heads.cu", "p < count; p++", "p + 1 < count; p++", CHUNKED_17,
    ),
    Mutation(
        "gradient of a shared state: only the first sequence's",
        "sum_states.cu",
        "m < count; m = next[S + m]",
        "m < count; m = count",
        OPTIONS + "recurrent-float32-20-state",
    ),
    Mutation(
        "padding rows not honoured",
        "span.cuh", "s.in_place && span.initial < 0", "false", "test_pool and sm_80",
    ),
    Mutation(
        "cu_seqlens: the last sequence not checked",
        "dispatch.cu",
        "for (int64_t m = threadIdx.x; m < count; m += kThreads)",
        "for (int64_t m = threadIdx.x; m + 1 < count; m += kThreads)",
        "test_wrong_cu_seqlens and sm_80",
    ),
    Mutation(
        "launches on the default stream",
        "dispatch.cu",
        "static_cast<cudaStream_t>(context->stream)",
        "nullptr",
        "test_launches",
    ),
]  # fmt: skip


def replace(name: str, text: str, instead: str) -> None:
    """In a file of the copy."""
    file = COPY / "csrc/cuda" / name
    contents = file.read_text()
    if contents.count(text) != 1:
        raise SystemExit(f"{name}: expected once, found {contents.count(text)} times:\n{text}")
    file.write_text(contents.replace(text, instead))


def build_library() -> Path:
    return gpu.build_library(COPY / "csrc")


class FirstFailure:
    """A plugin of pytest."""

    text: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.text:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.text = f"{report.nodeid.split('::')[1]}: {crash.message if crash else 'failed'}"


def run_tests(tests: str, library: Path, result: Connection) -> None:
    gpu.build_library = lambda: library
    first = FirstFailure()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", tests, str(TESTS)], [first])
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        result.send(first.text)
    else:
        raise SystemExit(output.getvalue())


def failure(tests: str, library: Path) -> str | None:
    """The first of the tests that fails and what it says; None: none does.

    In a process of its own, which is a copy of this one: a library stays loaded in a process, and
    a defect may end it.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_tests, args=(tests, library, sender))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        print(f"{tests}: no verdict within {LIMIT} s")
        return None
    if receiver.poll():
        return receiver.recv()
    if process.exitcode and process.exitcode < 0:
        return f"{tests}: ended by signal {-process.exitcode}"
    raise SystemExit(f"pytest could not run {tests}")


def main() -> None:
    words = sys.argv[1:]
    chosen = [each for each in MUTATIONS if not words or any(word in each.name for word in words)]
    shutil.rmtree(COPY.parent, ignore_errors=True)
    shutil.copytree(gpu.ROOT / "csrc", COPY / "csrc")
    for left_out in LEFT_OUT:
        replace(*left_out)
    library = build_library()
    shutil.copytree(COPY, PRISTINE)
    every_test = " or ".join(f"({tests})" for tests in dict.fromkeys(m.tests for m in chosen))
    if complaint := failure(every_test, library):
        raise SystemExit(f"without any defect: {complaint}")
    survivors = []
    for mutation in chosen:
        start = time.monotonic()
        replace(mutation.file, mutation.text, mutation.instead)
        complaint = failure(mutation.tests, build_library())
        shutil.copytree(PRISTINE, COPY, dirs_exist_ok=True)  # with the files' times, for ninja
        seconds = time.monotonic() - start
        first_line = (complaint or "SURVIVES").splitlines()[0]
        print(f"{mutation.name}\n    {first_line} ({seconds:.0f} s)", flush=True)
        if not complaint:
            survivors.append(mutation.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    if survivors:
        raise SystemExit("not caught: " + "; ".join(survivors))


if __name__ == "__main__":
    main()
