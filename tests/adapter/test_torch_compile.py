"""The operator inside torch.compile: one graph, around the registered operator."""

import pytest
import recurrence
import torch
from backend import array, relative_rms, tensor
from new_process import run
from samples import flat, random_grads, random_inputs

import keras_adapter
from keras_adapter import RWKVKernelOperator


@pytest.mark.skipif(not keras_adapter.has_kernels, reason="the kernels are not built")
def test_the_registered_operator_is_in_the_graph():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    x = random_inputs(2, 9, 2, 8, states=2)
    given = [tensor(flat(a)) for a in x[:4]] + [tensor(a) for a in x[4:]]
    operator = RWKVKernelOperator(8)

    @torch.compile(fullgraph=True, backend=backend)
    def f(*x):
        return operator(*x[:5], with_state=True, init_state=x[5])

    y, state = f(*given)
    (graph,) = graphs
    assert torch.ops.rwkv6.wkv.default in {node.target for node in graph.graph.nodes}
    for a, b in zip((y, state), recurrence.wkv(*x)):
        assert relative_rms(array(a).reshape(b.shape), b) < 1e-6


def test_inductor_and_gradients():
    x = random_inputs(2, 9, 2, 8)
    given = [tensor(flat(a)) for a in x[:4]] + [tensor(x[4])]
    leaves = [a.requires_grad_() for a in given]
    operator = RWKVKernelOperator(8)

    def loss(*x):
        return torch.sin(operator(*x)[0]).sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(found, expected)


def test_a_length_that_is_open_with_the_high_level_implementation():
    """One graph for every length, with gradients."""
    operator = RWKVKernelOperator(8, high_level=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(*x):
        return operator(*x[:5], with_state=True, init_state=x[5])

    torch._dynamo.utils.counters.clear()
    for T in (5, 40, 70):
        x, grads = random_inputs(2, T, 2, 8, states=2), random_grads(2, T, 2, 8)
        given = [tensor(flat(a)) for a in x[:4]] + [tensor(a) for a in x[4:]]
        for a in given:
            a.requires_grad_()
        for a in given[:4]:
            torch._dynamo.mark_dynamic(a, 1)
        outputs = f(*given)
        found = torch.autograd.grad(outputs, given, [tensor(flat(grads[0])), tensor(grads[1])])
        expected = (*recurrence.wkv(*x), *recurrence.gradients(*grads, *x))
        for a, b in zip((*outputs, *found), expected, strict=True):
            assert relative_rms(array(a.detach()).reshape(b.shape), b) < 5e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_export_of_any_length(tmp_path):
    """The recipe of README.md: torch.export to a .pt2 file and back, with each implementation.

    The process that reads it finds no compiler, and needs none to import keras_adapter.
    """

    class Model(torch.nn.Module):
        def __init__(self, high_level):
            super().__init__()
            self.operator = RWKVKernelOperator(8, high_level=high_level)

        def forward(self, r, k, v, w, u):
            return self.operator(r, k, v, w, u, with_state=True)

    def inputs(T):
        x = random_inputs(2, T, 2, 8)
        return x, (*(tensor(flat(a)) for a in x[:4]), tensor(x[4]))

    length = torch.export.Dim("length", min=2)
    shapes = (*({1: length},) * 4, None)
    for file, high_level in (("native.pt2", False), ("high_level.pt2", True)):
        program = torch.export.export(Model(high_level), inputs(40)[1], dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / file)
    cases = {T: inputs(T) for T in (2, 33, 70)}
    torch.save([given for _, given in cases.values()], tmp_path / "inputs.pt")
    code = (
        "import torch, keras_adapter\n"
        "for name in ('native', 'high_level'):\n"
        "    f = torch.export.load(f'{name}.pt2').module()\n"
        "    torch.save([f(*x) for x in torch.load('inputs.pt')], f'{name}.pt')\n"
    )
    done = run(code, tmp_path, PATH="")
    assert done.returncode == 0, done.stderr
    for name in ("native", "high_level"):
        found = torch.load(tmp_path / f"{name}.pt")
        for (x, _), outputs in zip(cases.values(), found, strict=True):
            for a, b in zip(outputs, recurrence.wkv(*x), strict=True):
                assert relative_rms(array(a).reshape(b.shape), b) < 1e-6, name
