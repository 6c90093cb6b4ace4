"""torch_rwkv6.compat for calls of [B, T, C]: RWKV-LM, RWKV-PEFT, Vision-RWKV, remote code."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from samples import Call, random_call, relative_rms
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from walk import walk

from torch_rwkv6.compat import blinkdl, vision_rwkv
from torch_rwkv6.compat.hugging_face import rwkv6_linear_attention

PAGE = Path(__file__).parents[1] / "docs" / "coming-from.md"
BOUNDS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2.5e-3}
SIZES = [(1, 50, 1, 1), (3, 7, 2, 5), (2, 40, 2, 32)]


def channels(call: Call) -> list[Tensor]:
    """r, k, v, w of [B, T, C] and u."""
    return [*(x.flatten(2) for x in (call.r, call.k, call.v, call.w)), call.u]


def sizes(call: Call) -> tuple[int, int, int, int]:
    B, T, H, N = call.r.shape
    return B, T, H * N, H


def expected(call: Call, state: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """y as [B, T, C] and the final state as [key, value], from a state [B, H, N, N] like it."""
    r, k, v, w, u, _ = call.floats()
    y, state = walk(r, k, v, torch.exp(-torch.exp(w)), u, state, reverse=reverse)
    return y.flatten(2), state


def zeros(call: Call) -> Tensor:
    B, _, H, N = call.r.shape
    return call.r.new_zeros(B, H, N, N)


def assert_close(
    found: Call, y: Tensor, exact: Call, oracle: Tensor, roundings: float = 1.0
) -> None:
    """The outputs, and the gradients of all inputs."""
    bound = roundings * BOUNDS[found.r.dtype]
    grad = torch.randn(oracle.shape).to(y.dtype)
    assert y.dtype == found.r.dtype
    assert relative_rms(y, oracle) < bound
    grads = torch.autograd.grad(y, found.differentiable(), grad)
    oracle_grads = torch.autograd.grad(oracle, exact.differentiable(), grad.double())
    for own, x in zip(grads, oracle_grads, strict=True):
        assert relative_rms(own, x) < bound


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("BTHN", SIZES, ids=str)
def test_a_call_without_a_state(BTHN: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    call = random_call(*BTHN, dtype=dtype, extreme=True)
    own, exact = call.leaves(), call.double().leaves()
    oracle, _ = expected(exact, zeros(exact))
    assert_close(own, blinkdl.RUN_CUDA_RWKV6(*channels(own)), exact, oracle)


def test_both_forms_of_a_call_are_one() -> None:
    call = random_call(3, 7, 2, 5)
    r, k, v, w, u = inputs = channels(call)
    y = blinkdl.RUN_CUDA_RWKV6(*inputs)
    for other in (
        blinkdl.RUN_CUDA_RWKV6(r, k, v, w, u=u),
        blinkdl.RUN_CUDA_RWKV6(*sizes(call), r, k, v, w, u=u),
        blinkdl.RUN_CUDA_RWKV6(*sizes(call), *inputs),
        blinkdl.RUN_CUDA_RWKV6(r=r, k=k, v=v, w=w, u=u),
    ):
        assert torch.equal(other, y)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_a_tuned_state_is_value_by_key(shared: bool, dtype: torch.dtype) -> None:
    call = random_call(3, 9, 2, 5, dtype=dtype, states=1 if shared else 3, state_dtype=dtype)
    if shared:
        call.initial_state = call.initial_state[0]  # [H, N, N], like time_state
    own, exact = call.leaves(), call.double().leaves()
    oracle, _ = expected(exact, exact.initial_state.mT.expand(3, 2, 5, 5))
    y = blinkdl.RUN_CUDA_RWKV6_STATE(*sizes(call), *channels(own), s=own.initial_state)
    assert_close(own, y, exact, oracle)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_pieces_with_their_states_equal_the_whole(dtype: torch.dtype) -> None:
    call = random_call(2, 12, 2, 5, dtype=dtype, states=2)
    own, exact = call.leaves(), call.double().leaves()
    oracle, oracle_state = expected(exact, exact.initial_state.mT)
    s, outputs = own.initial_state, []
    for part in (slice(0, 1), slice(1, 7), slice(7, 12)):
        before = s.detach().clone()
        *tokens, u = channels(own)
        tokens = [x[:, part] for x in tokens]
        y, after = blinkdl.RUN_CUDA_RWKV6_INFCTX(*tokens[0].shape, 2, *tokens, u, s)
        assert torch.equal(s, before)
        outputs.append(y)
        s = after
    assert s.dtype == call.initial_state.dtype
    y = torch.cat(outputs, 1)
    assert relative_rms(s, oracle_state.mT) < BOUNDS[dtype]
    # the loss needs the last state too: its gradient goes through all pieces
    weight = torch.randn(s.shape, dtype=torch.float64)
    grads, oracle_grads = (
        torch.autograd.grad(y.sum() + (weight * state).sum(), c.differentiable())
        for c, y, state in ((own, y.double(), s.double()), (exact, oracle, oracle_state.mT))
    )
    for found, x in zip(grads, oracle_grads, strict=True):
        assert relative_rms(found, x) < 2 * BOUNDS[dtype]  # bfloat16: a gradient in three parts


def test_no_state_is_a_state_of_zeros() -> None:
    call = random_call(2, 6, 2, 5)
    found = blinkdl.RUN_CUDA_RWKV6_INFCTX(*sizes(call), *channels(call))
    zero = blinkdl.RUN_CUDA_RWKV6_INFCTX(*sizes(call), *channels(call), zeros(call))
    assert all(torch.equal(a, b) for a, b in zip(found, zero, strict=True))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("BTHN", SIZES, ids=str)
def test_vision_rwkv_looks_both_ways(BTHN: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    call = random_call(*BTHN, dtype=dtype, extreme=True)
    own, exact = call.leaves(), call.double().leaves()
    oracle, _ = expected(exact, zeros(exact))
    r, k, v, w, u, _ = exact.floats()
    back, _ = expected(Call(r, k, v, w, 0 * u), zeros(exact), reverse=True)
    y = vision_rwkv.RUN_CUDA_RWKV6(*sizes(call), *channels(own))
    # in bfloat16 both directions are rounded, and their sum
    assert_close(own, y, exact, oracle + back, roundings=1.5)


FACES = {
    "plain": (blinkdl.RUN_CUDA_RWKV6, False, False),
    "with sizes": (blinkdl.RUN_CUDA_RWKV6, True, False),
    "state": (blinkdl.RUN_CUDA_RWKV6_STATE, True, True),
    "infctx": (blinkdl.RUN_CUDA_RWKV6_INFCTX, True, True),
    "vision": (vision_rwkv.RUN_CUDA_RWKV6, True, False),
}


@pytest.mark.parametrize("name", FACES)
def test_compiles_in_one_graph_for_all_lengths(name: str) -> None:
    face, with_sizes, with_state = FACES[name]

    def step(*inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        H = inputs[4].shape[0]
        return face(*((*inputs[0].shape, H) if with_sizes else ()), *inputs)

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for T in (6, 9):
        call = random_call(2, T, 2, 5, states=2 if with_state else None)
        call = call.leaves()
        inputs = channels(call) + [call.initial_state] * with_state
        outputs = [f(*inputs) for f in (compiled, step)]
        torch.testing.assert_close(*outputs)
        grads = [
            torch.autograd.grad(
                sum(x.square().sum() for x in (y if isinstance(y, tuple) else (y,))),
                call.differentiable(),
            )
            for y in outputs
        ]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", FACES)
def test_autocast_leaves_decays_and_states_in_float32(name: str) -> None:
    face, with_sizes, with_state = FACES[name]
    call = random_call(2, 9, 2, 8, states=2 if with_state else None)
    r, k, v, w, u = channels(call)
    start = sizes(call) if with_sizes else ()
    state = [call.initial_state] * with_state
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = face(*start, r, k, v, w, u, *state)
    low = face(*start, r.bfloat16(), k.bfloat16(), v.bfloat16(), w, u, *state)
    if name == "infctx":
        assert torch.equal(found[1], low[1])
        assert found[1].dtype == torch.float32
        found, low = found[0], low[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, low)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"r": None}, TypeError, "r: expected a torch.Tensor, got NoneType"),
        ({"u": None}, TypeError, "u: expected a torch.Tensor"),
        ({"v": 1.0}, TypeError, "v: expected a torch.Tensor"),
        ({"r": torch.ones(2, 5, 2, 4)}, ValueError, r"r: expected 3 dimensions \[B, T, C\]"),
        ({"k": torch.ones(2, 5, 9)}, ValueError, r"k: expected C = H \* N = 2 \* 4 .* \(2, 5, 9\)"),
        ({"w": torch.ones(2, 6, 8)}, ValueError, "w: expected the shape of r"),
        ({"u": torch.ones(8)}, ValueError, r"u: expected 2 dimensions \[H, N\]"),
        ({"T": 6}, ValueError, r"B, T, C: expected .* r = \(2, 5, 8\), got \(2, 6, 8\)"),
        ({"H": 4}, ValueError, r"H, C // H: expected .* u = \(2, 4\), got \(4, 2\)"),
        ({"s": [0.0]}, TypeError, "s: expected a torch.Tensor"),
        ({"s": torch.ones(3, 2, 4, 4)}, ValueError, r"s: .*\(2, 2, 4, 4\).* \(3, 2, 4, 4\)"),
        ({"s": torch.ones(2, 4)}, ValueError, r"s: expected \[H, N, N\] = \(2, 4, 4\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input_is_named(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    call = random_call(2, 5, 2, 4)
    names = ("B", "T", "C", "H", "r", "k", "v", "w", "u", "s")
    values = (*sizes(call), *channels(call), zeros(call))
    with pytest.raises(error, match=message):
        blinkdl.RUN_CUDA_RWKV6_STATE(**dict(zip(names, values, strict=True)) | change)


# A model as the hub has them: one function for WKV, and the states of all layers in one tensor.
REMOTE_CODE = """
import torch
from torch import nn

def rwkv6_linear_attention(training, receptance, key, value, time_decay, time_first, state):
    B, T, _ = key.shape
    H, N = time_first.shape
    r, k, v = (x.float().view(B, T, H, N) for x in (receptance, key, value))
    decay = torch.exp(-torch.exp(time_decay.float())).view(B, T, H, N)
    state = torch.zeros(B, H, N, N) + state
    y = []
    for t in range(T):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        y.append((r[:, t, :, None, :] @ (state + time_first[..., None] * kv)).squeeze(-2))
        state = decay[:, t, :, :, None] * state + kv
    return torch.stack(y, 1), state

class Attention(nn.Module):
    def __init__(self, H, N, layer):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(H * N, H * N, bias=False) for _ in range(4))
        self.time_first = nn.Parameter(torch.randn(H, N))
        self.layer = layer

    def forward(self, x, state):
        r, k, v, w = (m(x) for m in self.maps)
        layer_state = None if state is None else state[..., self.layer]
        out, layer_state = rwkv6_linear_attention(
            self.training, r, k, v, w, self.time_first, layer_state
        )
        if layer_state is not None:
            state[..., self.layer] = layer_state
        return x + out.reshape(x.shape)

class Model(nn.Module):
    def __init__(self, H=2, N=8, L=2):
        super().__init__()
        self.layers = nn.ModuleList(Attention(H, N, layer) for layer in range(L))

    def forward(self, x, state):
        for layer in self.layers:
            x = layer(x, state)
        return x
"""


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "modeling_stand_in.py").write_text(REMOTE_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "modeling_stand_in", raising=False)
    return importlib.import_module("modeling_stand_in")


def replace(model: torch.nn.Module) -> None:
    """The lines that docs/coming-from.md adds after from_pretrained."""
    (block,) = re.findall(r"^```diff\n([^`]*from_pretrained[^`]*)^```", PAGE.read_text(), re.M)
    lines = [line[1:] for line in block.splitlines() if line.startswith("+")]
    exec("\n".join(lines), {"model": model})


def test_the_recipe_replaces_the_function_of_remote_code(remote: ModuleType) -> None:
    model = remote.Model()
    x, steps = torch.randn(3, 10, 16), torch.randn(3, 2, 16)
    results = []
    for replaced in (False, True):
        if replaced:
            replace(model)
            assert remote.rwkv6_linear_attention is rwkv6_linear_attention
        with torch.no_grad():
            state = torch.zeros(3, 2, 8, 8, 2)
            outputs = [model(part, state) for part in (x, *steps.split(1, 1))]
        results.append([*outputs, state])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_replaced_remote_code_trains_with_and_without_a_state(remote: ModuleType) -> None:
    model, x = remote.Model(), torch.randn(3, 10, 16)
    grads = []
    model(x, torch.zeros(3, 2, 8, 8, 2)).square().mean().backward()
    grads.append([p.grad.clone() for p in model.parameters()])
    replace(model)
    for state in (torch.zeros(3, 2, 8, 8, 2), None):
        model.zero_grad()
        model(x, state).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for found in grads[1:]:
        torch.testing.assert_close(found, grads[0], rtol=1e-4, atol=1e-5)


def test_the_page_s_walk_in_both_directions(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    scope: dict[str, object] = {}
    exec(code, scope)
    call = random_call(2, 12, 2, 5, dtype=torch.float64)
    r, k, v, w, u, _ = call.floats()
    ahead, _ = expected(call, zeros(call))
    back, _ = expected(Call(r, k, v, w, 0 * u), zeros(call), reverse=True)
    found = scope["bidirectional"](r, k, v, w, u)
    torch.testing.assert_close(found.flatten(2), ahead + back)
