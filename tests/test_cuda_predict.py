"""What the CUDA kernels do to shared memory, and the predictions of how long they take."""

from __future__ import annotations

import re

import pytest
import torch
from ptxcpu import build, speed
from ptxcpu.sass import Instruction
from samples import random_call

pytestmark = pytest.mark.skipif(build.find_nvcc() is None, reason=build.NVCC_MISSING)
if build.find_nvcc():
    from cuda import predict
    from cuda.gpu import gpu as gpu_of
needs_disassembler = pytest.mark.skipif(
    not (build.find_tool("nvdisasm") and build.find_tool("cuobjdump")),
    reason="nvdisasm or cuobjdump was not found",
)

H200 = speed.GPUS["90"]
TOKENS = 128
# For 16 tokens of a head: wavefronts of shared memory, and how many of them are bank conflicts.
MOST_WAVEFRONTS = {
    ("forward_chunked", 32): (443, 94),
    ("state_walk", 32): (173, 40),
    ("backward_chunked", 32): (1700.5, 159),
    ("sum_heads", 32): (0, 0),
    ("forward_chunked", 64): (918, 70),
    ("state_walk", 64): (362, 0),
    ("backward_chunked", 64): (3859, 322),
    ("sum_heads", 64): (0, 0),
    ("forward_chunked", 128): (2461, 134),
    ("state_walk", 128): (1108, 0),
    ("backward_chunked", 128): (10086, 1154),
    ("sum_heads", 128): (0, 0),
}


@pytest.fixture(scope="module", params=[32, 64, 128])
def ran(request):
    """A head size, and the launches of a forward and backward."""
    gpu, call = gpu_of(), random_call(1, TOKENS, 1, request.param, torch.bfloat16, states=1)
    gpu.runtime.reset()
    with gpu.runtime.settings(check=0, cc=90):
        gpu.forward(call)
        gpu.backward(call, *call.grad_outputs())
    return request.param, gpu.runtime.launches()


def test_bank_conflicts(ran):
    N, launches = ran
    for launch in launches:
        (name,) = re.findall(r"(\w+)_kernel", launch.name)
        found = launch.statistics
        conflicts = found["shared_wavefronts"] - found["shared_wavefronts_ideal"]
        most_wavefronts, most_conflicts = MOST_WAVEFRONTS[name, N]
        assert found["shared_wavefronts"] * 16 / TOKENS <= most_wavefronts, name
        assert conflicts * 16 / TOKENS <= most_conflicts, name


def test_launches_without_running(ran):
    """The host's code launches for tensors that are nowhere what it does for others."""
    N, launches = ran
    outlines = predict.launches_of(H200, predict.Shape(1, TOKENS, 1, N)).values()
    assert [(each.kernel, each.grid, each.block, each.shared) for each in outlines] == [
        (each.kernel, each.grid, each.block, each.shared) for each in launches
    ]
    assert not any(each.statistics["warp_instructions"] for each in outlines)


def test_a_warp_by_itself():
    load = Instruction("LDS", "R1, [R2]", stall=2, done=3)
    add = Instruction("FADD", "R3, R1, R1", stall=4, waits=1 << 3)
    other = Instruction("FADD", "R4, R5, R5", stall=4)
    latency = speed.LATENCIES["LDS"]
    assert speed.alone_cycles([load, other]) == 2 + 4
    assert speed.alone_cycles([load, add]) == latency + 4
    assert speed.alone_cycles([load, other, add]) == latency + 4  # meanwhile
    assert speed.alone_cycles([load, *[other] * 10, add]) == 2 + 11 * 4  # it came earlier
    first = Instruction("HMMA.1688.F32.TF32", "R4, R8, R10, RZ", stall=1)
    more = Instruction("HMMA.1688.F32.TF32", "R4, R8.reuse, R10, R4", stall=1)
    assert speed.alone_cycles([first, more]) == speed.LATENCIES["HMMA"] + 1
    assert speed.alone_cycles([first, first]) == 2
    assert speed.alone_cycles([Instruction("BAR.SYNC", stall=5)]) == speed.BARRIER + 5


def test_warps_queue():
    # 100 instructions and 150 cycles of waiting: one warp of a scheduler, then two, then many
    work = speed.Work(4, 400, 0, 0, 250)
    assert speed.times_in(H200, work, 1) == {
        "issue": 100,
        "shared memory": 0,
        "tensor cores": 0,
        "latency": 150,
    }
    assert sum(speed.times_in(H200, work, 2).values()) == 100 * (1 + 100 / 250) + 150
    assert sum(speed.times_in(H200, work, 50).values()) == pytest.approx(50 * 100, rel=0.01)
    # no more than four wavefronts of four blocks, one after another; two of four tensor cores
    shared = speed.Work(4, 4, 1000, 0, 1)
    assert sum(speed.times_in(H200, shared, 50).values()) == pytest.approx(50 * 1000, rel=0.01)
    tensor = speed.Work(4, 4, 0, 1000 * H200.tensor_flops, 1)
    assert sum(speed.times_in(H200, tensor, 50).values()) == pytest.approx(50 * 1000, rel=0.01)


def test_waves():
    work = speed.Work(4, 400, 0, 0, 250)
    one = speed.predict(H200, work, 132, 2, 0)
    assert (one.limit, one.waves, one.blocks) == ("latency", 1, 1)
    assert one.seconds == pytest.approx(250 / (H200.clock * 1e9))
    three = speed.predict(H200, work, 2 * 264 + 1, 2, 0)  # a last block by itself
    assert (three.waves, three.blocks) == (3, 2)
    assert three.seconds == pytest.approx((290 + 290 + 250) / (H200.clock * 1e9))
    slow = speed.predict(H200, work, 132, 2, H200.bandwidth * 1e9)
    assert (slow.limit, slow.seconds) == ("DRAM", 1)


@needs_disassembler
def test_predictions(monkeypatch, capsys):
    shapes = [predict.Shape(1, T, 4, 32) for T in (1024, 2048)]
    short, long = (predict.predicted(H200, shape) for shape in shapes)
    walk, *others = (row.role for row in short if row.role.purpose == "state_walk, forth")
    assert not others
    # k, v and w of a token are read; 16 tokens take as many wavefronts, whatever the length
    counted = predict.counted(32)[walk]
    assert counted["DRAM bytes"].each == 3 * 2 * 32
    assert counted["wavefronts"].start == 0 < counted["wavefronts"].each
    purposes = [row.role.purpose for row in short if row.role.call == "backward"]
    assert purposes == [
        "state_walk, back",
        "scan",
        "state_walk, forth",
        "scan",
        "state_walk, checkpoints",
        "backward_chunked",
        "sum_heads",
    ]
    assert all(row.predicted >= row.floor > 0 for row in short)
    assert sum(row.predicted for row in short) < sum(row.predicted for row in long)
    # what an instruction of PTX makes of machine code is known if ptxas makes no copies
    for symbol in {row.role.kernel for row in short}:
        (ptx,) = (
            text for f in predict.ptx_files() if f".entry {symbol}(" in (text := f.read_text())
        )
        mma = [each for each in predict.ptx_opcodes(ptx, symbol) if each.startswith("mma")]
        assert predict.code_of(symbol, "90").kernel.count("HMMA") == len(mma)
        assert bool(mma) == ("chunked" in symbol or "walk" in symbol)

    monkeypatch.setattr(predict, "MEASURED", {shapes[0]: {"H200": (10, 50), "H100": (20, 60)}})
    predict.main(["--arch", "90"])
    printed = capsys.readouterr().out
    total = sum(row.predicted for row in short)
    assert f"| 50: {total / 50:.2f} | 60: {total / 60:.2f} |" in printed
    assert all(f"| {row.role.call}: {row.role.purpose} |" in printed for row in short)


def test_measured_times_are_those_of_the_page():
    page = predict.PAGE.read_text("utf-8")
    for shape, measured in predict.MEASURED.items():
        numbers = ", ".join(map(str, shape))
        forward, both = measured["H200"]
        assert re.search(rf"^\| {numbers} \| {forward} \| .* \| {both:,} \| ", page, re.MULTILINE)
        forward, both = measured["H100"]
        row = rf"^\| {numbers} \| {forward} \| \d+ \| {both - forward:,} \| [\d,]+ \|$"
        assert re.search(row, page, re.MULTILINE)
