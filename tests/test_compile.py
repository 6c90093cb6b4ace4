"""torch.compile, torch.export and AOTInductor give what eager gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from samples import random_call, sample_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_rwkv6
from torch_rwkv6 import wkv, wkv_update

SAMPLES = list(sample_inputs())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def function(call):
    """A model in miniature around the operator: something to fuse before and after it."""

    def run(r, k, v, w, u, state):
        y, final = wkv(
            r * 0.5, k.tanh(), v, w - 1, u, state, state_map=call.state_map,
            cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        return torch.relu(y) ** 2, final * 2

    return run


def outputs_and_gradients(f, call):
    call = call.leaves()
    outputs = f(*call.floats())
    loss = sum((x * torch.arange(x.numel()).view(x.shape).cos()).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, call.differentiable())]


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "aot_eager") for name in SAMPLES]
    + [("state each", "inductor"), ("packed, state map", "inductor")],
)
def test_fullgraph_forward_and_backward(name, backend):
    call = sample_inputs()[name]
    compiled = torch.compile(function(call), fullgraph=True, backend=backend)
    expected = outputs_and_gradients(function(call), call)
    for a, b in zip(outputs_and_gradients(compiled, call), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dynamic_batch_and_tokens_compile_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wkv, fullgraph=True, backend=counter, dynamic=True)
    for B, T in ((2, 5), (3, 17), (4, 300), (7, 2)):
        call = random_call(B=B, T=T, H=11, N=8)  # no two sizes alike
        found = outputs_and_gradients(compiled, call)
        for a, b in zip(found, outputs_and_gradients(wkv, call), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_packed_offsets_computed_in_the_graph():
    """The number of sequences is known only when the compiled code runs."""

    def f(tokens, r, k, v, w, u):
        cu_seqlens = (tokens == 0).nonzero().squeeze(1)
        return wkv(r, k, v, w, u, cu_seqlens=cu_seqlens)

    call = random_call(B=1, T=9)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        for starts in ([0, 4], [0, 2, 7]):
            tokens = torch.ones(10, dtype=torch.long)
            tokens[[*starts, 9]] = 0
            for a, b in zip(
                compiled(tokens, *call.floats()[:5]), f(tokens, *call.floats()[:5]), strict=True
            ):
                assert torch.equal(a, b)


def test_wkv_update_functionalises():
    def step(r, k, v, w, u, state):
        y = wkv_update(r, k, v, w, u, state)
        return y + wkv_update(r, k, v, w, u, state)  # sees the state of the first call

    call = random_call(states=2)
    *inputs, state = call.floats()
    other = state.clone()
    with torch.no_grad():
        expected = step(*inputs, state)
        found = torch.compile(step, fullgraph=True)(*inputs, other)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(other, state)


def test_compile_errors_are_the_functions_own():
    call = random_call()
    with pytest.raises(Exception, match="k: expected the shape of r"):
        torch.compile(wkv, fullgraph=True)(call.r, call.k[:, 1:], call.v, call.w, call.u)


@pytest.mark.parametrize("name", ["state each", "packed, state map"])
def test_cuda_fake_tensors_trace_without_a_gpu(name):
    call = sample_inputs()[name]
    with FakeTensorMode():
        fake = [
            None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")
            for x in call.args()
        ]
        y, state = torch.ops.rwkv6.wkv(*fake)
        grads = torch.ops.rwkv6.wkv_backward(y, state, *fake)
    assert y.device.type == state.device.type == "cuda"
    assert y.shape == call.r.shape
    assert [g.shape for g in grads] == [x.shape for x in call.differentiable()]


def test_meta_tensors():
    call = random_call(states=2).map(lambda x: x.to("meta"))
    y, state = wkv(*call.floats())
    assert y.is_meta
    assert state.shape == (2, 2, 4, 4)


class Module(torch.nn.Module):
    def forward(self, r, k, v, w, u, state):
        y, final = wkv(r, k, v, w, u, state)
        return y * 2, final


def export(call):
    T = torch.export.Dim("T", min=2, max=4096)
    tokens = {1: T}
    shapes = (tokens, tokens, tokens, tokens, None, None)
    return torch.export.export(Module(), call.floats(), dynamic_shapes=shapes)


def test_export_with_dynamic_length():
    program = export(random_call(states=2))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "rwkv6.wkv.default" in targets
    call = random_call(T=123, states=2)
    for a, b in zip(program.module()(*call.floats()), Module()(*call.floats()), strict=True):
        torch.testing.assert_close(a, b)


LOAD_AND_RUN = """
import sys, torch
assert "torch_rwkv6" not in sys.modules
torch.ops.load_library(sys.argv[1])
model = torch._inductor.aoti_load_package(sys.argv[2])
for inputs, expected in torch.load(sys.argv[3]):
    for a, b in zip(model(*inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
assert "torch_rwkv6" not in sys.modules
print("equal")
"""


def assert_runs_elsewhere(package, calls, folder):
    """The package gives what is expected in a process that has the library alone."""
    torch.save(calls, folder / "data.pt")
    library = Path(torch_rwkv6.__file__).with_name("_C.abi3.so")
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, str(library), package, str(folder / "data.pt")],
        capture_output=True, text=True, env=os.environ, cwd=folder,
    )  # fmt: skip
    assert run.stdout == "equal\n", run.stderr


@pytest.mark.gpu
def test_aotinductor_package_needs_only_the_library(tmp_path):
    """On a CPU tests/test_export.py has it of a whole model."""
    package = torch._inductor.aoti_compile_and_package(
        export(random_call(states=2)), package_path=str(tmp_path / "model.pt2")
    )
    call = random_call(T=77, states=2)
    assert_runs_elsewhere(package, [(call.floats(), Module()(*call.floats()))], tmp_path)
