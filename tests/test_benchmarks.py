"""The benchmarks: contenders compute WKV6, wrong ones are not timed, missing ones are named."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import relative_rms
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is not installed
from benchmarks import __main__ as command_line  # noqa: E402
from benchmarks import exact, figure, model, race, readme, report, to_gguf, train, work  # noqa: E402
from benchmarks.contenders import (  # noqa: E402
    C_INTERFACE,
    CHUNKED,
    COMPILED,
    EAGER,
    FMA,
    OURS,
    REQUIREMENTS,
    RIVALS,
    STATE,
    STREAM,
    WITHOUT_KERNELS,
    Contender,
    chunked,
    limits,
)
from torch_rwkv6 import nn, reference  # noqa: E402

FORWARD = work.Work("forward", 2, 40, 2, 16)
EVERY_KIND = [replace(FORWARD, kind=kind) for kind in ("forward", "backward", "forward + backward")]
EVERY_KIND.append(work.Work("decode", 2, 1, 2, 16))


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory):
    """Shared, as its workers take seconds to start and forget each race."""
    with race.Stable(tmp_path_factory.mktemp("race") / "rivals") as stable:
        yield stable


@pytest.fixture
def new_stable(tmp_path: Path):
    with race.Stable(tmp_path / "rivals") as stable:
        yield stable


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A maker of contenders whose module is `text`, in the folder where new_stable looks for it."""
    monkeypatch.setitem(REQUIREMENTS, "rogue", "rogue>=1")

    def make(text: str) -> Contender:
        # `benchmarks.contenders.rogue`, reached through the package's search path
        site = tmp_path / "rivals" / "rogue"
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(
            f"import benchmarks.contenders as c\nc.__path__.append({str(site)!r})\n"
        )
        (site / "rogue.py").write_text(text)
        return Contender("rogue", "rogue:prepare", "rogue")

    return make


@pytest.mark.parametrize("extreme", [False, True], ids=["plain", "extreme w"])
@pytest.mark.parametrize("T", [1, 31, 32, 200])
def test_chunked_pytorch_is_the_recurrence(T: int, extreme: bool) -> None:
    call = work.Work("forward + backward", 2, T, 2, 8, extreme=extreme)
    inputs = {name: torch.from_numpy(a) for name, a in exact.make_inputs(call).items()}
    args = [inputs[name] for name in ("r", "k", "v", "w", "u", "state")]
    leaves = [x.requires_grad_() for x in args]
    y, state = chunked.wkv(*leaves)
    grads = torch.autograd.grad((y, state), leaves, (inputs["grad_y"], torch.ones_like(state)))
    doubles = [x.detach().double().requires_grad_() for x in args]
    right_y, right_state = reference.recurrence(*doubles)
    right = torch.autograd.grad(
        (right_y, right_state), doubles, (inputs["grad_y"].double(), torch.ones_like(right_state))
    )
    for found, expected in zip((y, state, *grads), (right_y, right_state, *right), strict=True):
        assert relative_rms(found, expected) < 1e-6


@pytest.mark.parametrize("call", EVERY_KIND, ids=lambda call: call.kind)
def test_exact_results_are_those_of_autograd(call: work.Work, monkeypatch) -> None:
    monkeypatch.setattr(exact, "SEGMENT", 16)  # several segments, the last one shorter
    inputs = exact.make_inputs(call)
    x = {name: torch.from_numpy(a).double() for name, a in inputs.items()}
    leaves = [x[name].requires_grad_() for name in ("r", "k", "v", "w", "u", "state")]
    y, state = reference.recurrence(*leaves)
    if call.kind in ("forward", "decode"):
        right = (y, state)
    else:
        right = torch.autograd.grad(y, leaves, x["grad_y"])
    found = exact.exact(call, inputs)
    assert tuple(found) == work.OUTPUTS[call.kind]
    for name, expected in zip(found, right, strict=True):
        assert relative_rms(torch.from_numpy(found[name]), expected.detach()) < 1e-12


def test_heads_are_checked_by_themselves() -> None:
    many = replace(FORWARD, H=6)
    inputs = exact.make_inputs(many)
    assert exact.checked_heads(many) == [0, 1, 4, 5]
    x = [torch.from_numpy(inputs[n]).double() for n in ("r", "k", "v", "w", "u", "state")]
    y, state = reference.recurrence(*x)
    found = exact.exact(many, inputs)
    assert (
        exact.relative_error(
            found, exact.of_heads({"y": y.numpy(), "state": state.numpy()}, [0, 1, 4, 5])
        )
        < 1e-12
    )
    assert exact.checked_heads(replace(FORWARD, H=1)) == [0]


def test_relative_error_is_that_of_the_worst_tensor() -> None:
    right = {"y": np.ones(4), "state": np.full(4, 2.0)}
    assert exact.relative_error(
        {"y": np.ones(4), "state": np.full(4, 2.2)}, right
    ) == pytest.approx(0.1)
    assert np.isnan(exact.relative_error({"y": np.full(4, np.nan), "state": right["state"]}, right))


@pytest.mark.parametrize("call", EVERY_KIND, ids=lambda call: call.kind)
def test_our_own_contenders_race(stable: race.Stable, call: work.Work) -> None:
    decode, others = [C_INTERFACE, STATE], [CHUNKED, WITHOUT_KERNELS]
    contenders = [OURS, EAGER] + (decode if call.kind == "decode" else others)
    entrants = [race.Entrant(c, call) for c in (*contenders, STREAM)]
    results = stable.race(entrants, 0.02)
    for result in results:
        assert result.note == ""
        assert len(result.seconds) >= 2
        assert min(result.seconds) > 0
    checked = [r for r in results if "limit" not in r.entrant.contender.label]
    assert all(r.error < 2e-6 and r.extreme_error < 2e-6 for r in checked)
    rows = [result.row(results[0]) for result in results]
    assert rows[0]["ratio"] == pytest.approx(1)
    per_call = min(results[1].seconds)
    assert rows[1]["min_ns"] == pytest.approx(per_call * 1e9 / (call.B * call.T * call.H))
    assert json.loads(json.dumps(rows)) == rows


def test_compiled_contender_is_right(stable: race.Stable) -> None:
    (result,) = stable.race([race.Entrant(COMPILED, replace(FORWARD, T=3))], 0.02)
    assert result.note == ""
    assert result.error < 1e-6


def test_bfloat16(stable: race.Stable) -> None:
    half = replace(FORWARD, dtype="bfloat16")
    results = stable.race(
        [race.Entrant(c, half) for c in (OURS.named("bf16"), EAGER, CHUNKED)], 0.02
    )
    for result in results:
        assert 1e-3 < result.error < work.HALF_PROMISE


def test_contenders_that_are_not_installed_are_named(stable: race.Stable) -> None:
    packaged = [rival for rival in RIVALS if rival.package]
    assert len(packaged) == 3
    results = stable.race([race.Entrant(rival, FORWARD) for rival in packaged], 0.02)
    for result, rival in zip(results, packaged, strict=True):
        if result.seconds:  # it is installed for everybody
            assert result.error < 1e-5
        else:
            assert result.note.startswith("not installed: pip install --target ")
            assert f"rivals/{rival.package} " in result.note


def test_contenders_that_cannot_say_so(stable: race.Stable) -> None:
    decode = EVERY_KIND[-1]
    results = stable.race([race.Entrant(CHUNKED, decode), race.Entrant(C_INTERFACE, FORWARD)], 0.02)
    assert [r.note for r in results] == [
        "one token is no chunk: see the loop",
        "measured for decoding in float32 only",
    ]
    assert not any(r.seconds for r in results)


def test_wrong_results_are_not_timed(new_stable: race.Stable, broken) -> None:
    rogue = broken(
        "from benchmarks.contenders.eager import recurrence, torch_job\n"
        "def prepare(work, inputs, threads):\n"
        "    return torch_job(work, inputs, threads, lambda r, k, *x: recurrence(k, r, *x))\n"
    )
    (result,) = new_stable.race([race.Entrant(rogue, FORWARD)], 0.02)
    assert result.note.startswith("wrong: relative error ")
    assert result.error > 0.1
    assert result.seconds == []
    assert "min_ns" not in result.row(None)


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("raise ValueError('too many heads')", "ValueError: too many heads"),
        ("import os; print('last words', flush=True); os._exit(3)", "ended with exit code 3: last"),
    ],
)
def test_failures_are_rows_not_ends(new_stable: race.Stable, broken, body: str, note: str) -> None:
    rogue = broken(f"def prepare(work, inputs, threads):\n    {body}\n")
    results = new_stable.race([race.Entrant(rogue, FORWARD), race.Entrant(EAGER, FORWARD)], 0.02)
    assert results[0].note.startswith(note)
    assert results[1].seconds


def test_a_broken_promise_of_ours_stops_everything(stable: race.Stable, monkeypatch) -> None:
    monkeypatch.setitem(work.PROMISES, ("float32", "forward"), 1e-12)
    with pytest.raises(RuntimeError, match=r"torch_rwkv6, forward, B2 T40 H2 N16.*promised 1e-12"):
        stable.race([race.Entrant(OURS, FORWARD)], 0.02)


def test_a_level_that_the_cpu_lacks_is_a_note(stable: race.Stable) -> None:
    strange = replace(OURS, environment=(("RWKV6_CPU_ISA", "avx1024"),))
    (result,) = stable.race([race.Entrant(strange, FORWARD)], 0.02)
    assert "RWKV6_CPU_ISA" in result.note
    assert result.seconds == []


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_limits_touch_everything(threads: int) -> None:
    library = limits.build()
    count = 16 * 7
    sources = [np.random.default_rng(i).random(count, np.float32) for i in range(3)]
    targets = [np.zeros(count, np.float32) for _ in range(2)]
    pointers = [
        (limits.ctypes.c_void_p * len(x))(*(a.ctypes.data for a in x)) for x in (sources, targets)
    ]
    library.limits_stream(pointers[0], 3, pointers[1], 2, limits.ctypes.c_int64(count), threads)
    for target in targets:
        np.testing.assert_allclose(target, sum(sources), rtol=1e-6)
    state = np.ones(count, np.float32)
    library.limits_state(
        limits.ctypes.c_void_p(state.ctypes.data),
        limits.ctypes.c_int64(count),
        limits.ctypes.c_int64(3),
        limits.ctypes.c_float(0.5),
        threads,
    )
    np.testing.assert_array_equal(state, 0.125)
    # x = x / 2 + 1 stays near 2 however often: every lane of every chain of every thread
    total = library.limits_fma(limits.ctypes.c_int64(10**7), threads)
    one = library.limits_fma(limits.ctypes.c_int64(10**7), 1)
    assert total == pytest.approx(threads * one, rel=1e-4)
    assert one > 0


def test_limits_are_raced(stable: race.Stable) -> None:
    results = stable.race([race.Entrant(c, FORWARD) for c in (STREAM, FMA, STATE)], 0.02)
    assert all(r.seconds and r.error is None and r.note == "" for r in results)


def test_peak_memory_counts_what_a_call_needs(stable: race.Stable) -> None:
    big = work.Work("forward", 1, 4096, 2, 64)
    (result,) = stable.race([race.Entrant(OURS, big)], 0.02)
    if result.peak_bytes is None:
        pytest.skip("only Linux tells")
    assert big.footprint <= result.peak_bytes < 3 * big.footprint


def test_tables() -> None:
    columns = (
        report.Column("contender", "", left=True),
        report.Column("min_ns", "ns min", report.number),
        report.Column("error", "error", report.short_error),
        report.Column("note", "", left=True),
    )
    rows = [
        {"contender": "a", "min_ns": 1234.5, "note": ""},
        {"contender": "long name", "min_ns": 5.678, "note": ""},
        {"contender": "b", "note": "not installed"},
    ]
    table = report.Table("title", columns, rows)
    assert table.text().split("\n") == [
        "title",
        "           ns min  error",
        "a           1,234      -",
        "long name    5.68      -",
        "b               -      -  not installed",
    ]
    assert table.markdown().split("\n") == [
        "| title | ns min |  |",
        "| --- | ---: | --- |",
        "| a | 1,234 |  |",
        "| long name | 5.68 |  |",
        "| b | - | not installed |",
    ]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["op", "--shape", "1,40,2,16"], ["op"]),
        (["backward", "--shape", "1,40,2,16"], ["backward"]),
        (["decode", "--shape", "2,1,2,16"], ["decode"]),
        (["scaling", "--tokens", "32", "--lengths", "16", "64"], ["scaling"]),
    ],
    ids=lambda x: x[0],
)
def test_commands_write_table_json_and_picture(
    arguments: list[str], names: list[str], stable: race.Stable, tmp_path: Path, capsys, monkeypatch
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for module in ("op", "backward", "decode"):  # scaling starts workers of its own
        monkeypatch.setattr(f"benchmarks.{module}.Stable", lambda rivals: nullcontext(stable))
    # the compiled contender takes longest to get ready and has a test of its own
    for module in ("op", "backward"):
        monkeypatch.setattr(f"benchmarks.{module}.SHORT_RIVALS", (EAGER, CHUNKED))
    monkeypatch.setattr("benchmarks.op.LEVELS", ("baseline",))
    monkeypatch.setattr("benchmarks.decode.CONTENDERS", (OURS, EAGER, STATE))
    monkeypatch.setattr("benchmarks.scaling.CONTENDERS", (OURS,))
    monkeypatch.setattr("benchmarks.scaling.KINDS", ("forward + backward",))
    options = ["--short", "--threads", "1", "--seconds", "0.01", "--out", str(tmp_path)]
    command_line.main([*arguments, *options])
    (name,) = names
    screen = capsys.readouterr().out
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert "torch_rwkv6" in content["machine"]
    assert any(v.startswith("torch_rwkv6 ") for v in content["versions"])
    assert abs(date.fromisoformat(content["date"]) - date.today()) <= timedelta(days=1)
    for table in content["tables"]:
        assert table["title"] in screen
        assert table["rows"]
        assert table["markdown"] in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_model_is_checked_and_timed(tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for name, value in (("VOCAB", 64), ("LAYERS", 2), ("WIDTH", 64)):
        monkeypatch.setattr(f"benchmarks.model.{name}", value)
    monkeypatch.setattr("benchmarks.model.peer", lambda path: None)  # TorchScript takes seconds
    threads = torch.get_num_threads()
    options = ["--threads", "1", "--rounds", "2", "--prompt", "8", "--rivals", str(tmp_path)]
    try:
        command_line.main(["model", "--cpu-time", *options, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    content = json.loads((tmp_path / "model.json").read_text())
    decoding, reading = content["tables"]
    assert decoding["title"] == "decoding, 1 thread, processor time"
    assert reading["title"] == "a prompt of 8, 1 thread, processor time"
    rows = {row["contender"]: row for row in decoding["rows"]}
    assert list(rows)[:3] == ["torch_rwkv6, fp32", "torch_rwkv6, bf16", "torch_rwkv6, int8"]
    assert rows["torch_rwkv6, fp32"]["error"] < 1e-6
    assert 0 < rows["torch_rwkv6, bf16"]["error"] < 0.05
    if "llama.cpp, f32" in rows:  # it is installed for everybody
        assert rows["torch_rwkv6, fp32"]["llama"] > 0
    else:
        assert "(python -m benchmarks rivals llama.cpp)" in capsys.readouterr().out
    assert (tmp_path / "model.png").exists()


def test_a_model_with_other_logits_is_not_timed() -> None:
    own = model.of_ours(nn.RWKV6(32, 1, 64).requires_grad_(False), "fp32")
    with pytest.raises(AssertionError, match=r"torch_rwkv6, fp32: relative error .*below 0.0001"):
        model.check(own, torch.ones(32))


def test_gguf_has_the_tensors_that_llama_cpp_asks_for(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="GGUF files are written through gguf")
    own = model.load(ROOT / "tests" / "data" / "rwkv6-kjv.pth", dtype=torch.float32)
    expected = {"output", "output_norm", "token_embd", "token_embd_norm"}
    optional = {f"TIME_MIX_LERP_{x}" for x in "WKVRG"}  # fused into one
    for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.RWKV6]:
        name = gguf.TENSOR_NAMES[tensor]
        if "{bid}" in name and tensor.name not in optional:
            expected |= {name.format(bid=i) for i in range(own.n_layer)}
    for kind in to_gguf.KINDS:
        to_gguf.write_gguf(own, tmp_path / kind, kind)
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / kind).tensors}
        assert {name.rpartition(".")[0] for name in tensors} == expected
        head = tensors["output.weight"]
        assert head.tensor_type.name == kind
        found = torch.tensor(gguf.quants.dequantize(head.data, head.tensor_type))
        limit = {"F32": 1e-9, "BF16": 1e-2, "Q8_0": 1e-2}[kind]
        assert relative_rms(found.reshape(own.head.weight.shape), own.head.weight) < limit
        fused = tensors["blk.1.time_mix_lerp_fused.weight"].data.reshape(5, -1)
        torch.testing.assert_close(torch.tensor(fused[1]), own.blocks[1].att.time_maa_k[0, 0])


def test_kinds_of_work_are_what_torch_says_of_the_operators() -> None:
    for name, kind in train.KIND_OF.items():
        operator = getattr(torch.ops.aten, name.removeprefix("aten::"))
        tags = {tag for o in operator.overloads() for tag in getattr(operator, o).tags}
        if operator in flop_registry:
            assert kind == train.PRODUCTS
        elif torch.Tag.pointwise in tags and name != "aten::clone":
            assert kind == train.ELEMENTWISE
        elif kind == train.PRODUCTS:  # which call one of the registry
            assert name in ("aten::linear", "aten::matmul")
        elif kind == train.ELEMENTWISE:
            assert name == "aten::sum" or "_norm" in name
        else:
            assert (kind == train.LOSS) == any(x in name for x in ("softmax", "nll", "cross"))


@pytest.fixture(scope="module")
def trainee() -> train.Trainee:
    return train.of_ours(vocab=64, layers=2, width=64)


@pytest.mark.parametrize("dtype", train.DTYPES)
def test_a_step_is_taken_apart(trainee: train.Trainee, dtype: str, monkeypatch) -> None:
    monkeypatch.setattr(train, "LEAST_SHARE", 0.0)
    row, operators = train.take_apart(trainee, torch.randint(64, (1, 9)), dtype, "eager")
    calls = {(o["operator"], o["kind"]): o["calls"] for o in operators}
    assert [name for name, kind in calls if kind == train.UNKNOWN] == []
    assert row[train.UNKNOWN] is None
    shares = [row[kind] for kind in train.KINDS if kind != train.UNKNOWN]
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1)
    assert row["speed"] == pytest.approx(8e3 / row["ms"])
    assert {kind for name, kind in calls if name.startswith("rwkv6::")} == {
        train.FORWARD,
        train.BACKWARD,
    }
    assert sum(n for (_, kind), n in calls.items() if kind == train.BACKWARD) >= 2  # once a layer
    assert calls["aten::_fused_adamw_", train.OPTIMISER] == 1
    assert calls["aten::_log_softmax_backward_data", train.LOSS] == 1
    # A layer has 8 matrices and two pairs of low rank; a product's backward is two products.
    products = [calls.get((f"aten::{x}", train.PRODUCTS), 0) for x in ("mm", "bmm", "addmm")]
    assert sum(products) == 3 * (2 * 12 + 1)


def test_compiled_loops_count_as_elementwise(monkeypatch) -> None:
    monkeypatch.setattr(train, "LEAST_SHARE", 0.0)

    class Block(torch.nn.Module):  # torch.compile leaves a class of torch.nn as it is
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(torch.nn.functional.silu(self.linear(x)))

    block = Block()
    whole = torch.nn.Sequential(torch.nn.Embedding(16, 8), block, torch.nn.Linear(8, 16))
    tiny = train.Trainee("tiny", whole, whole, [block], "")
    operators = {}
    for mode in train.MODES:
        row, found = train.take_apart(tiny, torch.randint(16, (1, 9)), "float32", mode)
        assert row[train.UNKNOWN] is None
        assert row[train.ELEMENTWISE] > 0
        operators[mode] = {o["operator"] for o in found if o["operator"].startswith("aten::")}
    loops = {"aten::silu", "aten::native_layer_norm", "aten::silu_backward"}
    assert loops <= operators["eager"]
    assert not loops & operators["compiled"]


def test_an_operator_that_nobody_listed_is_shown_as_such() -> None:
    new, inside = Namespace(name="aten::new_one", cpu_parent=None), Namespace(name="aten::mm")
    for mode in train.MODES:
        assert train.kind_of(new, mode) == train.UNKNOWN
    inside.cpu_parent = Namespace(name=train.OPTIMISER, cpu_parent=None)
    assert train.kind_of(inside, "eager") == train.OPTIMISER
    host = Namespace(name="some::region of 1", cpu_parent=None)
    assert train.kind_of(host, "eager") == train.REST
    assert train.kind_of(host, "compiled") == train.ELEMENTWISE


def test_train_compares_models_of_equal_size(tmp_path: Path, capsys) -> None:
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package, reason="the other model is its Llama, pictures need more")
    sizes = ["--layers", "1", "--vocab", "64", "--tokens", "8", "--lengths", "16", "8"]
    threads = torch.get_num_threads()
    try:
        options = ["--short", "--threads", "1", "--out", str(tmp_path)]
        command_line.main(["train", *sizes, *options])
    finally:
        torch.set_num_threads(threads)
    screen = capsys.readouterr().out
    content = json.loads((tmp_path / "train.json").read_text())
    assert all(table["title"] in screen for table in content["tables"])
    ours, llama = map(float, re.findall(r"\(([\d.]+) million parameters\)", content["about"]))
    assert llama == pytest.approx(ours, rel=0.01)
    assert "RWKV-6, eager, is " in content["about"]
    shares, operators, growth = content["tables"]
    assert [row["contender"] for row in shares["rows"]] == [
        "eager, float32",
        "eager, bf16 autocast",
    ]
    assert operators["rows"]
    assert [row["T"] for row in growth["rows"]] == [8, 16]
    for row in growth["rows"]:
        assert row["ratio"] == pytest.approx(row["RWKV-6"] / row["Llama"])
        assert row["steps"] == 3
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_train_leaves_out_steps_that_would_not_fit(monkeypatch) -> None:
    monkeypatch.setattr(train.memory, "available", lambda: 10**10)
    assert train.fits(2.4, 1024, 4096)
    assert not train.fits(2.6, 1024, 4096)
    assert train.fits(None, 1024, 4096)  # not measured on this system
    rows = [{"T": 1, "ratio": 0.9}, {"T": 2, "ratio": 1.2}, {"T": 4}]
    assert train.crossing(rows, "eager").endswith("the faster from T = 2 on.")


@pytest.mark.parametrize(
    ("ratios", "sentence"),
    [
        ([0.8, 1.1, 1.5], " RWKV-6, eager, is the faster from T = 2 on."),
        ([1.1, 0.9, 1.5], " RWKV-6, eager, is the faster from T = 4 on."),
        ([0.8, 0.9, 0.95], " RWKV-6, eager, is slower up to T = 4."),
        ([1.2, 1.3, 1.4], " RWKV-6, eager, is the faster from T = 1 on."),
    ],
)
def test_train_says_where_the_lines_cross(ratios: list[float], sentence: str) -> None:
    rows = [{"T": T, "ratio": ratio} for T, ratio in zip((1, 2, 4), ratios, strict=True)]
    assert train.crossing(rows, "eager") == sentence


def test_serve_measures_speed_and_memory(tmp_path: Path, capsys) -> None:
    for package in ("starlette", "uvicorn", "matplotlib"):
        pytest.importorskip(package, reason="the server needs torch_rwkv6[serve], pictures more")
    checkpoint = ROOT / "tests" / "data" / "rwkv6-kjv.pth"
    sizes = ["--model", str(checkpoint), "--clients", "1", "2", "--prompt", "5", "--tokens", "3"]
    watched = ["--minutes", "0.01"] if sys.platform == "linux" else []
    options = ["--short", "--threads", "1", "--seconds", "0.01", "--out", str(tmp_path)]
    command_line.main(["serve", *sizes, *watched, *options])
    screen = capsys.readouterr().out
    content = json.loads((tmp_path / "serve.json").read_text())
    assert all(table["title"] in screen for table in content["tables"])
    speed, *memory = content["tables"]
    assert [row["contender"] for row in speed["rows"]] == [
        "1 client, 1 thread",
        "2 clients, 1 thread",
    ]
    assert speed["rows"][0]["ratio"] == 1
    for row in speed["rows"]:
        seconds = row["clients"] * 3 / row["best"]  # of the fastest turn: 3 tokens a client
        assert 0 < row["first_ms"] <= row["last_first_ms"]
        assert row["turns"] > 1 or row["last_first_ms"] <= seconds * 1e3
    assert len(memory) == bool(watched)
    for table in memory:
        (row,) = table["rows"]
        assert row["requests"] > 0
        assert 50 < row["first_mb"] <= row["most_mb"] < 2000  # torch alone is more than 50
        assert len(row["minutes"]) == len(row["megabytes"])
        assert row["minutes"][-1] >= 0.01
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_serve_says_why_there_is_no_server(tmp_path: Path, monkeypatch) -> None:
    server = tmp_path / "serve.py"
    server.write_text("import sys\nsys.exit(f'no such file: {sys.argv[1]}')\n")
    monkeypatch.setattr("benchmarks.serve.SERVER", server)
    with pytest.raises(SystemExit, match=r"^serve: no such file: nowhere\.pth$"):
        command_line.main(["serve", "--model", "nowhere.pth", "--threads", "1"])


@pytest.mark.parametrize("peaks", [(None, None), (None, 3.0), (2.0, 3.0)])
def test_growth_is_drawn_with_the_memory_that_was_measured(peaks, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    rows = [
        {
            "contender": "ours",
            "kind": "forward",
            "B": 1,
            "H": 1,
            "T": T,
            "min_ns": 5.0,
            "peak_mb": p,
        }
        for T, p in zip((16, 64), peaks, strict=True)
    ]
    figure.growth(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


TABLES = {
    "avx2": "| forward | ns min | error |\n| --- | ---: | ---: |\n| a | 5 | 1e-7 |\n| b | - | - |",
    "avx512": "| forward | ns min | error |\n| --- | ---: | --: |\n| b | 3 | 2e-7 |\n| c | 4 | - |",
}
MACHINES = {"avx2": "AMD, 2 cores, AVX2", "avx512": "Intel, 8 cores, AVX512"}
OF_BOTH = """\
| forward | AVX2: ns min | AVX-512: ns min | error |
| --- | ---: | ---: | ---: |
| a | 5 | - | 1e-7 |
| b | - | 3 | 2e-7 |
| c | - | 4 | - |
"""
OF_ONE = """\
| forward | AVX-512: ns min | error |
| --- | ---: | ---: |
| b | 3 | 2e-7 |
| c | 4 | - |
"""


@pytest.fixture
def figures(tmp_path: Path):
    """A maker of the figures of instruction sets, in a folder, and of a page beside it."""

    def make(*measured: str, page: str) -> Namespace:
        folder = tmp_path / "docs" / "benchmarks"
        for isa in measured:
            (folder / isa).mkdir(parents=True, exist_ok=True)
            content = {"machine": MACHINES[isa], "date": "2026-11-22", "versions": ["a 1", "b 2"]}
            content |= {"about": f"of {isa}", "tables": [{"markdown": TABLES[isa]}]}
            (folder / isa / "op.json").write_text(json.dumps(content))
            (folder / isa / "op.md").write_text("")
        path = tmp_path / "README.md"
        path.write_text(page)
        return Namespace(out=folder, pages=[path])

    return make


def test_readme_takes_its_columns_from_each_machine(figures) -> None:
    marker = "<!-- benchmark op 0: ns min; error -->\n"
    args = figures("avx512", page=f"before\n{marker}| old |\n<!-- end -->\nafter\n")
    (page,) = args.pages
    readme.run(args)
    assert page.read_text() == f"before\n{marker}{OF_ONE}<!-- end -->\nafter\n"
    args = figures("avx2", page=page.read_text())  # measured later
    for _ in range(2):
        readme.run(args)
        assert page.read_text() == f"before\n{marker}{OF_BOTH}<!-- end -->\nafter\n"


def test_readme_says_which_machine_gave_a_number(figures) -> None:
    parts = ("processors", "machines", "about", "picture", "0")
    markers = [f"<!-- benchmark op {part} -->" for part in parts]
    args = figures("avx512", "avx2", page="".join(f"{m}\n<!-- end -->\n" for m in markers))
    readme.run(args)
    texts = args.pages[0].read_text().split("<!-- end -->\n")
    filled = [text.removeprefix(f"{m}\n") for text, m in zip(texts, markers, strict=False)]
    where = "docs/benchmarks/avx"
    assert filled == [
        "- AVX2: AMD, 2 cores, 2026-11-22\n- AVX-512: Intel, 8 cores, 2026-11-22\n",
        "- AVX2: AMD, 2 cores, AVX2; a 1, b 2; 2026-11-22. Every table: [op](docs/benchmarks/avx2/"
        "op.md)\n- AVX-512: Intel, 8 cores, AVX512; a 1, b 2; 2026-11-22. Every table: [op](docs/"
        "benchmarks/avx512/op.md)\n",
        "- AVX2: of avx2\n- AVX-512: of avx512\n",
        f"![op, AVX2]({where}2/op.png)\n![op, AVX-512]({where}512/op.png)\n",
        f"AVX2:\n\n{TABLES['avx2']}\n\nAVX-512:\n\n{TABLES['avx512']}\n",
    ]


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("op 7", r"op\.json has no table 7"),
        ("op hat", r"op\.json has no table hat"),
        ("op 0: us min", "table 'forward', AVX2, has no column 'us min'"),
        ("other 0", r"no \S+other\.json: run python -m benchmarks other --out '\S+/\{isa\}'"),
        ("op 0: ns min", "'forward' and 'backward', AVX-512, are not the same table"),
    ],
)
def test_a_marker_for_what_is_not_there(marker: str, message: str, figures, monkeypatch) -> None:
    if "same table" in message:
        monkeypatch.setitem(TABLES, "avx512", TABLES["avx512"].replace("forward", "backward"))
    args = figures("avx2", "avx512", page=f"<!-- benchmark {marker} -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match=message):
        readme.run(args)


def test_pages_show_the_committed_figures(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs/benchmarks", "docs/benchmarks")
    for page in readme.PAGES:
        shutil.copy(ROOT / page, page)
    command_line.main(["readme"])
    for page in readme.PAGES:
        filled = page.read_text("utf-8")
        assert filled == (ROOT / page).read_text("utf-8")
        assert "<!-- benchmark op 0: ns min" in filled
        assert "| torch_rwkv6 |" in filled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["swim"], "invalid choice: 'swim'"),
        (["op", "--shape", "1,2,3"], "argument --shape: invalid"),
        (["op", "--shape", "1,2,3,0"], "argument --shape: invalid"),
        (["op", "--threads", "0"], "argument --threads: invalid"),
        (["rivals", "numpy"], "rivals: numpy: expected some of jax, rwkv-ops, ggml"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.main(arguments)
    assert end.value.code != 0
    assert message in f"{end.value.code}{capsys.readouterr().err}"


def test_workers_end_with_the_race(tmp_path: Path) -> None:
    with race.Stable(tmp_path) as stable:
        stable.race([race.Entrant(EAGER, FORWARD)], 0.02)
        (worker,) = stable.workers.values()
        folder = stable.folder
        assert worker.process.poll() is None
    assert worker.process.poll() is not None
    assert not os.path.exists(folder)
