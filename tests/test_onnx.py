"""torch_rwkv6.onnx: what onnxruntime computes equals the recurrence in float64."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_model, random_tokens
from samples import Call, random_call, relative_rms, slow_call
from test_docs import CHECKPOINT, blocks
from torch import Tensor, nn
from torch.export import Dim

from torch_rwkv6 import wkv, wkv4
from torch_rwkv6.models import save

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3}


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    return [torch.from_numpy(x) for x in found]


class Operators(nn.Module):
    """Every dtype, with a state and without one."""

    def forward(self, *inputs: Tensor) -> Any:
        *six, initial_state = inputs[:6]
        *four, initial_state4 = inputs[6:]
        results = [wkv(*six, initial_state), wkv(*six, initial_state[:1])]
        results += [wkv(*(x.half() for x in six)), wkv(*(x.double() for x in six))]
        results += [wkv4(*four, initial_state4), wkv4(*(x.double() for x in four))]
        return [x for both in results for x in both]


def inputs_of(call: Call, D: int = 5) -> tuple[Tensor, ...]:
    B, T = call.r.shape[:2]
    state = torch.randn(B, 3, D)
    state[:, 1].abs_()  # a denominator
    return (*call.floats(), torch.randn(B, T, D), torch.randn(B, T, D), *torch.randn(2, D), state)


def test_operators(tmp_path: Path) -> None:
    from torch_rwkv6.onnx import TRANSLATIONS

    any_size = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    rows = {0: Dim.DYNAMIC}
    model, path = Operators().eval(), tmp_path / "operators.onnx"
    shapes = (*(any_size,) * 4, None, rows, any_size, any_size, None, None, rows)
    example = inputs_of(random_call(B=2, T=3, H=2, N=16, states=2))
    torch.onnx.export(
        model, example, path, dynamo=True, dynamic_shapes=(shapes,), verbose=False,
        custom_translation_table=TRANSLATIONS,
    )  # fmt: skip
    sizes = ((1, 1), (3, 1), (2, 70))
    calls = [(random_call(B, T, 2, 16, states=B, extreme=True), 1) for B, T in sizes]
    for call, factor in (*calls, (slow_call("w = -9"), 5)):
        inputs = inputs_of(call)
        found, own = run(path, *inputs), model(*inputs)
        exact = model(*(x.double() for x in inputs))
        for x, y, z in zip(found, exact, own, strict=True):
            assert x.dtype == z.dtype
            assert x.shape == z.shape
            assert relative_rms(x, y) < factor * TOLERANCE[x.dtype]


def test_packed_sequences_are_refused() -> None:
    from torch_rwkv6.onnx import TRANSLATIONS

    translation = TRANSLATIONS[torch.ops.rwkv6.wkv.default]
    with pytest.raises(NotImplementedError, match="cu_seqlens: expected None"):
        translation(*(None,) * 7, torch.tensor([0, 2]))


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of any batch and length, prompts and single tokens."""
    monkeypatch.chdir(tmp_path)
    model = random_model("6", n_layer=2)
    save(model, CHECKPOINT)
    scope: dict[str, Any] = {}
    program, onnx, _ = blocks("docs/export.md")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(program + onnx, scope)
    for rows in (1, 3):
        state = own = model.initial_state(rows)
        for piece in random_tokens(rows, 7).split([5, 1, 1], 1):
            with torch.no_grad():
                logits, state = model(piece, state)
            found, *own = run(tmp_path / "model.onnx", piece, *own)
            torch.testing.assert_close((found, *own), (logits, *state), rtol=1e-4, atol=1e-4)
