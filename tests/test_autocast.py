"""Mixed precision: r, k, v in the autocast dtype; w, u and the state in float32."""

import pytest
import torch
from samples import random_call, relative_rms
from torch.library import opcheck

from torch_rwkv6 import reference, wkv, wkv_update

DEVICE = torch.get_default_device().type
LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_equals_casting_by_hand(low):
    call = random_call(states=2, N=16)
    r, k, v, w, u, state = call.floats()
    with torch.autocast(DEVICE, dtype=low):
        y, final = wkv(r, k, v, w, u, state)
    expected = wkv(r.to(low), k.to(low), v.to(low), w, u, state)
    assert y.dtype == low
    assert final.dtype == torch.float32
    assert torch.equal(y, expected[0])
    assert torch.equal(final, expected[1])


@pytest.mark.parametrize("low", LOW, ids=str)
def test_low_precision_w_u_and_state_go_up(low):
    call = random_call(states=2, N=16, dtype=low, state_dtype=low)
    with torch.autocast(DEVICE, dtype=low):
        y, _ = wkv(*call.floats())
    r, k, v, w, u, state = call.floats()
    assert torch.equal(y, wkv(r, k, v, w.float(), u.float(), state.float())[0])


def test_gradients_arrive_in_the_inputs_dtype():
    call = random_call(states=2, N=16, T=30).leaves()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, final = wkv(*call.floats())
        loss = y.float().square().sum() + final.square().sum()
    found = torch.autograd.grad(loss, call.differentiable())
    y, final = wkv(*call.floats())
    expected = torch.autograd.grad(y.square().sum() + final.square().sum(), call.differentiable())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert relative_rms(a, b) < 2e-2


def test_inputs_of_different_dtypes_become_one():
    call = random_call(states=2, N=16)
    r, k, v, w, u, state = call.floats()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        mixed = wkv(r.bfloat16(), k, v.half().float(), w.bfloat16(), u, state)
        same = wkv(r, k, v.half().float(), w.bfloat16().float(), u, state)
        wkv_update(r.bfloat16(), k, v, w, u, state)
    assert all(torch.equal(a, b) for a, b in zip(mixed, same, strict=True))


def test_bad_input_is_still_named():
    call = random_call(states=2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        with pytest.raises(ValueError, match="k: expected the shape of r"):
            wkv(call.r, call.k[1:], call.v, call.w, call.u)
        with pytest.raises(TypeError, match="state: "):
            wkv_update(*call.floats()[:5], call.initial_state.bfloat16())
        with pytest.raises(TypeError, match=r"r: expected a torch\.Tensor"):
            wkv(None, call.k, call.v, call.w, call.u)
        with pytest.raises(TypeError, match=r"v: expected a torch\.Tensor, got NoneType"):
            wkv(call.r, call.k, None, call.w, call.u)


def test_double_precision_is_left_alone():
    call = random_call(dtype=torch.float64, states=2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, _ = wkv(*call.floats())
    assert torch.equal(y, wkv(*call.floats())[0])


def test_backward_operator_takes_what_forward_saved():
    call = random_call(dtype=torch.bfloat16, w_dtype=torch.float32, states=2)
    grads = call.grad_outputs()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = torch.ops.rwkv6.wkv_backward(*grads, *call.args())
    expected = torch.ops.rwkv6.wkv_backward(*grads, *call.args())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_wkv_update_writes_into_the_callers_state():
    call = random_call(states=2, N=16)
    *inputs, state = call.floats()
    other = state.clone()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = wkv_update(*inputs, state)
    r, k, v, w, u = inputs
    expected = wkv_update(*(x.bfloat16() for x in (r, k, v)), w, u, other)
    assert torch.equal(y, expected)
    assert torch.equal(state, other)


def test_compiles_under_autocast():
    call = random_call(states=2)

    def f(*floats):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return wkv(*floats)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*call.floats()), f(*call.floats()), strict=True):
        assert torch.equal(a, b)


def test_opcheck_under_autocast():
    call = random_call(states=2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        opcheck(torch.ops.rwkv6.wkv.default, call.args(), test_utils=["test_faketensor"])


@pytest.mark.cpu
def test_the_reference_is_not_rounded():
    """Autocast reaches into the reference's own operations where it is called by hand."""
    call = random_call(B=3, states=2, state_map=[1, 0, 1])
    grads = call.grad_outputs()
    expected = [*reference.wkv(*call.args()), *reference.wkv_backward(*grads, *call.args())]
    with torch.autocast("cpu", torch.bfloat16):
        found = [*reference.wkv(*call.args()), *reference.wkv_backward(*grads, *call.args())]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
