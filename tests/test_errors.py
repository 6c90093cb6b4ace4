"""Bad input: an exception that names the argument, what was expected and what came."""

import os
import subprocess
import sys

import pytest
import torch
from samples import random_call

from torch_rwkv6 import wkv, wkv_update


def good(**options):
    call = random_call(B=2, T=5, H=3, N=4, states=2, **options)
    names = ("r", "k", "v", "w", "u", "initial_state", "state_map", "cu_seqlens")
    return dict(zip(names, call.args(), strict=True))


# argument, what replaces it, exception, text
BAD = [
    ("r", [1.0], TypeError, "r: expected a torch.Tensor, got list"),
    ("r", torch.zeros(2, 5, 3, 4, dtype=torch.int32), TypeError, "r: .*float64.*got torch.int32"),
    ("r", torch.zeros(2, 5, 12), ValueError, r"r: expected 4 dimensions \[B, T, H, N\]"),
    ("r", torch.zeros(2, 5, 3, 257), ValueError, "head size N from 1 to 256, got 257"),
    ("r", torch.zeros(2, 5, 3, 0), ValueError, "head size N from 1 to 256, got 0"),
    ("k", torch.zeros(2, 4, 3, 4), ValueError, r"k: .*\(2, 5, 3, 4\), got shape \(2, 4, 3, 4\)"),
    ("k", torch.zeros(2, 5, 3, 4).bfloat16(), TypeError, "k: .*float32.*got torch.bfloat16"),
    ("v", None, TypeError, "v: expected a torch.Tensor, got NoneType"),
    ("v", torch.zeros(2, 5, 3, 4, device="meta"), ValueError, "v: expected device cpu.*got meta"),
    ("w", torch.zeros(2, 5, 3, 4).half(), TypeError, "w: .*got torch.float16"),
    ("w", torch.zeros(5, 3, 4), ValueError, "w: .*got shape"),
    ("u", torch.zeros(12), ValueError, r"u: expected \[H, N\] = \(3, 4\), got shape \(12,\)"),
    ("u", torch.zeros(2, 3, 4), ValueError, r"u: expected \[H, N\] = \(3, 4\), got .*\(2, 3, 4\)"),
    ("u", torch.zeros(3, 4).double(), TypeError, "u: .*got torch.float64"),
    ("initial_state", torch.zeros(3, 4, 4), ValueError, r"initial_state: expected \[S, H, N, N\]"),
    ("initial_state", torch.zeros(3, 3, 4, 4), ValueError, "initial_state: 3 states for 2"),
    ("initial_state", torch.zeros(2, 3, 4, 5), ValueError, "initial_state: expected"),
    ("initial_state", torch.zeros(2, 3, 4, 4).half(), TypeError, "initial_state: .*float16"),
    ("state_map", torch.zeros(2), TypeError, "state_map: expected torch.int32 or torch.int64"),
    ("state_map", torch.zeros(2, 1).long(), ValueError, "state_map: expected 1 dimension"),
    ("state_map", torch.zeros(3).long(), ValueError, r"state_map: .*\(2\), got 3"),
    ("state_map", torch.tensor([0, 2]), RuntimeError, "state_map: entry 1 is 2, expected 0 to 1"),
    ("state_map", torch.tensor([-1, 0]), RuntimeError, "state_map: entry 0 is -1, expected 0 to 1"),
    ("cu_seqlens", torch.tensor([0, 5]), ValueError, "cu_seqlens: .*need B = 1.*got B = 2"),
]
PACKED = [
    (torch.tensor([0, 4]), RuntimeError, "cu_seqlens: the last must be T = 5, got 4"),
    (torch.tensor([1, 5]), RuntimeError, "cu_seqlens: the first must be 0, got 1"),
    (torch.tensor([0, 4, 3, 5]), RuntimeError, "cu_seqlens: must not fall"),
    (torch.tensor([0, 9, 5]), RuntimeError, "cu_seqlens: must not fall"),
    (torch.tensor([], dtype=torch.long), ValueError, "cu_seqlens: expected at least one"),
    (torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens: expected torch.int32 or torch.int64"),
    (torch.tensor([[0, 5]]), ValueError, "cu_seqlens: expected 1 dimension"),
]


def case_id(value):
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD, ids=case_id)
def test_wkv_names_what_is_wrong(name, value, error, text):
    arguments = good() | {name: value}
    with pytest.raises(error, match=text):
        wkv(**arguments)


# what is no tensor, or lies on another device, the dispatcher itself refuses
RAW = [bad for bad in BAD if isinstance(bad[1], torch.Tensor) and not bad[1].is_meta]


@pytest.mark.parametrize(("name", "value", "error", "text"), RAW, ids=case_id)
def test_the_raw_operator_refuses_as_well(name, value, error, text):
    arguments = good() | {name: value}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"{name}: "):
        torch.ops.rwkv6.wkv(*arguments.values())


# a negative entry of state_map is a padding row there
INPLACE = [bad for bad in BAD if "is -1" not in bad[3]]


@pytest.mark.parametrize(("name", "value", "error", "text"), INPLACE, ids=case_id)
def test_wkv_update_names_what_is_wrong(name, value, error, text):
    arguments = good() | {name: value}
    state = arguments.pop("initial_state")
    with pytest.raises(error, match=f"{name.replace('initial_', '')}: "):
        wkv_update(**arguments, state=state)


@pytest.mark.parametrize(("value", "error", "text"), PACKED, ids=case_id)
@pytest.mark.parametrize("function", [wkv, wkv_update])
def test_packed_offsets(function, value, error, text):
    call = random_call(B=1, T=5, states=1)
    if value.dim() == 1 and value.numel() > 2:  # so that the offsets alone are wrong
        call.initial_state = call.initial_state.repeat(value.numel() - 1, 1, 1, 1)
    with pytest.raises(error, match=text):
        function(*call.floats(), cu_seqlens=value)


def test_state_map_without_state():
    arguments = good() | {"initial_state": None, "state_map": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="state_map: given without initial_state"):
        wkv(**arguments)
    with pytest.raises(RuntimeError, match="state_map: given without initial_state"):
        torch.ops.rwkv6.wkv(*arguments.values())


def test_backward_checks_its_gradients():
    call = random_call(states=2)
    grad_y, grad_state = call.grad_outputs()
    op = torch.ops.rwkv6.wkv_backward
    for bad_y, bad_state, name in (
        (grad_y[:, 1:], grad_state, "grad_y"),
        (grad_y.double(), grad_state, "grad_y"),
        (grad_y, grad_state[1:], "grad_final_state"),
        (grad_y, grad_state.double(), "grad_final_state"),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=f"{name}: "):
            op(bad_y, bad_state, *call.args())


def test_state_of_wkv_update_must_have_a_contiguous_last_dimension():
    call = random_call(states=2)
    *inputs, state = call.floats()
    with pytest.raises(ValueError, match=r"state: .*last dimension must be contiguous"):
        wkv_update(*inputs, state.transpose(2, 3))
    with pytest.raises(RuntimeError, match=r"state: .*last dimension must be contiguous"):
        torch.ops.rwkv6.wkv_update(*inputs, state.transpose(2, 3))


def test_messages_hold_no_build_paths():
    call = random_call()
    with pytest.raises(RuntimeError) as caught:
        torch.ops.rwkv6.wkv(call.r, call.k[1:], call.v, call.w, call.u)
    assert "csrc" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_layouts_that_are_not_dense():
    call = random_call(states=2)
    with pytest.raises(TypeError, match=r"k: expected a dense tensor, got layout torch\.sparse"):
        wkv(call.r, call.k.to_sparse(), call.v, call.w, call.u)
    with pytest.raises(TypeError, match="state: expected a dense tensor"):
        wkv_update(*call.floats()[:5], call.initial_state.to_sparse())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_pointed_to_cu_seqlens(layout):
    x = torch.nested.nested_tensor([torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)], layout=layout)
    with pytest.raises(TypeError, match=r"r: expected a dense.*a nested one.*cu_seqlens"):
        wkv(x, x, x, x, torch.zeros(3, 4))


def test_autograd_names_the_operator():
    call = random_call()
    r = call.r.requires_grad_()
    y, _ = wkv(*call.floats())
    assert y.grad_fn.name() == "rwkv6_wkvBackward"
    call.k[0, 0] = torch.nan
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        y, _ = wkv(*call.floats())
        with (
            pytest.warns(UserWarning, match="rwkv6_wkvBackward"),
            pytest.raises(RuntimeError, match="'rwkv6_wkvBackward' returned nan"),
        ):
            torch.autograd.grad(y.sum(), r)


def test_outputs_too_large_for_memory():
    x = torch.zeros(1, 1, 1, 64).expand(2**16, 2**12, 64, 64)  # y: 4 TiB
    with pytest.raises(RuntimeError, match=r"out of memory for an output of shape \[65536, 4096"):
        wkv(x, x, x, x, torch.zeros(64, 64))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_unknown_instruction_set_is_an_error():
    code = (
        "import torch, torch_rwkv6; x = torch.zeros(1, 1, 1, 4);"
        "torch_rwkv6.wkv(x, x, x, x, x[0, 0])"
    )
    result = run(code, RWKV6_CPU_ISA="sse9")
    assert "RWKV6_CPU_ISA: expected one that this CPU has (" in result.stderr
    assert "), got sse9" in result.stderr


def test_sizes_beyond_32_bits_are_counted_in_64():
    # 2**31 tokens that are all the same one
    x = torch.zeros(1, 1, 1, 1).expand(1, 2**31, 1, 1)
    with pytest.raises(RuntimeError, match="cu_seqlens: the last must be T = 2147483648"):
        wkv(x, x, x, x, x[0, 0], cu_seqlens=torch.tensor([0, 1]))
