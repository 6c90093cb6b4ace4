"""The operator inside torch.compile: one graph, around the registered operator."""

import pytest
import recurrence
import torch
from backend import array, relative_rms, tensor
from samples import flat, random_inputs

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
