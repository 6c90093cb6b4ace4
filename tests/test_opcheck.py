"""torch.library.opcheck: schema, fake implementation, autograd registration and AOT dispatch."""

import itertools

import pytest
import torch
from samples import random_call, sample_inputs

from torch_rwkv6.contract import SCHEMAS

SAMPLES = list(sample_inputs())


def test_schemas_are_the_contract():
    """The binary's schemas are those of the Python installation without binary."""
    for name, signature in SCHEMAS.items():
        expected = torch._C.parse_schema(f"rwkv6::{name}{signature}")
        assert str(getattr(torch.ops.rwkv6, name).default._schema) == str(expected)


@pytest.mark.parametrize("needs_grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", SAMPLES)
def test_wkv(name, needs_grad):
    call = sample_inputs(T=2)[name]
    call = call.leaves() if needs_grad else call
    torch.library.opcheck(torch.ops.rwkv6.wkv.default, call.args())


@pytest.mark.parametrize("which", list(itertools.product([0, 1], repeat=6))[1:-1])
def test_wkv_requires_grad_combinations(which):
    call = random_call(T=2, states=2)
    floats = [x.requires_grad_() if on else x for x, on in zip(call.floats(), which, strict=True)]
    torch.library.opcheck(
        torch.ops.rwkv6.wkv.default,
        call.with_floats(floats).args(),
        test_utils=["test_autograd_registration", "test_aot_dispatch_static"],
    )


ALWAYS = ["test_schema", "test_autograd_registration", "test_faketensor"]
GIVEN = ["both", "grad_y", "grad_final_state", "neither"]


# The second derivative is traced operation by operation, which takes seconds. Which gradients are
# given and how sequences begin are independent in it, and so is where packed sequences begin. Sizes
# that are symbols are traced for two kinds of sequences.
TRACED_TWICE = [name for name in SAMPLES if not name.startswith("packed, s") or "map" in name]
BACKWARD = [
    pytest.param(name, given, grad, id=f"{name}-{given}-{'grad' if grad else 'no grad'}")
    for name, given, grad in itertools.product(SAMPLES, GIVEN, (False, True))
    if not grad or (name in TRACED_TWICE if given == "both" else name == "shared state")
]


@pytest.mark.parametrize(("name", "given", "needs_grad"), BACKWARD)
def test_wkv_backward(name, given, needs_grad):
    call = sample_inputs(T=2)[name]
    call = call.leaves() if needs_grad else call
    grads = [
        g.requires_grad_(needs_grad) if given in ("both", n) else None
        for n, g in zip(("grad_y", "grad_final_state"), call.grad_outputs(), strict=True)
    ]
    symbolic = not needs_grad or name in ("shared state", "packed, state map")
    sizes = "dynamic" if symbolic else "static"
    torch.library.opcheck(
        torch.ops.rwkv6.wkv_backward.default,
        (*grads, *call.args()),
        test_utils=[*ALWAYS, f"test_aot_dispatch_{sizes}"],
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_wkv_update(name):
    call = sample_inputs(T=2)[name]
    rows = 6
    call.initial_state = torch.randn(rows, 2, 4, 4)
    call.state_map = torch.randperm(rows)[: call.sequences]
    torch.library.opcheck(torch.ops.rwkv6.wkv_update.default, call.args())
    call.initial_state = torch.randn(call.sequences, 2, 4, 4)
    call.state_map = None
    torch.library.opcheck(torch.ops.rwkv6.wkv_update.default, call.args())
