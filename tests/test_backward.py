"""Backward: complete gradients, from y and from final_state, equal those of the recurrence."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import (
    FLOAT_DTYPES,
    SLOW_DECAYS,
    Call,
    random_call,
    relative_rms,
    sample_inputs,
    slow_call,
)

from torch_rwkv6 import chunked, reference, wkv

TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 2.5e-3,
    torch.float16: 3.2e-4,
}
SAMPLES = list(sample_inputs())


def gradients(call: Call, grad_outputs):
    call = call.leaves()
    y, state = wkv(*call.floats(), state_map=call.state_map, cu_seqlens=call.cu_seqlens)
    return torch.autograd.grad((y, state), call.differentiable(), grad_outputs)


def check(call: Call, tolerance=1.0):
    grad_y, grad_state = call.grad_outputs()
    found = gradients(call, (grad_y, grad_state))
    expected = reference.wkv_backward(grad_y.double(), grad_state.double(), *call.double().args())
    for name, x, a, b in zip(
        ("r", "k", "v", "w", "u", "initial_state"), call.floats(), found, expected, strict=False
    ):
        assert a.dtype == x.dtype, name
        assert relative_rms(a, b) <= tolerance * TOLERANCE[a.dtype], name


@pytest.mark.parametrize("T", [0, 1, 2, 63, 1024])
@pytest.mark.parametrize("N", [1, 8, 64, 100, 128])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_accuracy_with_extreme_decays(dtype, N, T):
    heads = max(2, 256 // N)
    B, H = (2, heads) if T < 100 else (1, 1)
    call = random_call(B=B, T=T, H=H, N=N, dtype=dtype, extreme=True, states=B)
    # grad_u is a sum of T rounded terms; with a single key there is one number to compare
    check(call, tolerance=1.5 if N * H < 64 else 1.0)


def test_accuracy_at_4096_tokens():
    check(random_call(B=1, T=4096, H=1, N=64, extreme=True, states=1))


@pytest.mark.parametrize("decays", SLOW_DECAYS)
def test_slow_decays(decays):
    check(slow_call(decays))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_options(name, dtype):
    check(sample_inputs(dtype, N=16)[name], tolerance=1.5)


@pytest.mark.parametrize("N", [*range(1, 20), 31, 33, 48, 80, 127, 255, 256])
def test_every_head_size(N):
    check(random_call(B=1, T=35, H=2, N=N, states=1))


@pytest.mark.parametrize("T", [15, 16, 17, 32, 33, 255, 256, 257, 300])
def test_lengths_around_blocks_and_segments(T):
    check(random_call(B=1, T=T, H=1, N=16, states=1))


@pytest.mark.parametrize("name", SAMPLES)
def test_gradcheck(name):
    call = sample_inputs(torch.float64, N=3)[name].double().leaves()

    def function(*floats):
        leaves = call.with_floats([*floats, *[None] * (6 - len(floats))])
        return torch.ops.rwkv6.wkv(*leaves.args())

    assert torch.autograd.gradcheck(function, call.differentiable())


@pytest.mark.parametrize("output", [0, 1], ids=["y", "final_state"])
def test_gradcheck_from_one_output(output):
    call = random_call(N=3, dtype=torch.float64, states=2).leaves()
    assert torch.autograd.gradcheck(lambda *a: wkv(*a)[output], call.differentiable())


def test_each_input_alone():
    call = random_call(N=8, T=20, states=1)
    grad_outputs = call.grad_outputs()
    complete = gradients(call, grad_outputs)
    for i in range(6):
        floats = [x.clone() for x in call.floats()]
        floats[i].requires_grad_()
        (found,) = torch.autograd.grad(wkv(*floats), [floats[i]], grad_outputs)
        assert torch.equal(found, complete[i])


def test_initial_state_of_half_precision_gets_its_own_dtype():
    call = random_call(
        B=4, T=9, H=8, N=16, dtype=torch.bfloat16, states=1, state_dtype=torch.bfloat16
    )
    check(call)


def test_shared_initial_state_sums_over_the_batch():
    call = random_call(B=3, T=9, N=8, dtype=torch.float64, states=1)
    grad_outputs = call.grad_outputs()
    shared = gradients(call, grad_outputs)[5]
    call.initial_state = call.initial_state.expand(3, -1, -1, -1)
    assert relative_rms(shared, gradients(call, grad_outputs)[5].sum(0, keepdim=True)) < 1e-14


def test_states_that_no_sequence_starts_from_get_zero():
    call = random_call(B=2, N=4, states=3, state_map=[2, 2])
    grad = gradients(call, call.grad_outputs())[5]
    assert (grad[:2] == 0).all()
    assert (grad[2] != 0).any()


@pytest.mark.parametrize(
    "options",
    [
        {"B": 0, "states": 1},
        {"B": 0, "states": 2, "state_map": []},
        {"B": 0, "T": 20, "states": 2, "state_map": []},
        {"B": 1, "T": 0, "states": 2, "state_map": [], "cu_seqlens": [0]},
    ],
    ids=str,
)
def test_states_of_no_sequence_at_all_get_zero(options):
    call = random_call(N=4, **options)
    for operators in (torch.ops.rwkv6, reference, chunked):
        grad = operators.wkv_backward(*call.grad_outputs(), *call.args())[5]
        assert grad.shape == call.initial_state.shape
        assert (grad == 0).all()


def test_padding_has_finite_gradients_and_passes_the_state_on():
    call = random_call(T=20, N=8, dtype=torch.float64, states=2)
    call.w[:, 10:] = -1e9
    call.k[:, 10:] = 0
    call.v[:, 10:] = 0
    grad_y, grad_state = call.grad_outputs()
    grad_y[:, 10:] = 0
    padded = gradients(call, (grad_y, grad_state))
    assert all(g.isfinite().all() for g in padded)
    short = Call(*(x[:, :10] for x in call.floats()[:4]), call.u, call.initial_state)
    for name, a, b in zip("rkvw", padded, gradients(short, (grad_y[:, :10], grad_state))):
        assert torch.equal(a[:, :10], b), name
    assert (padded[3][:, 10:] == 0).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_infinite_decays_have_finite_gradients(dtype):
    call = random_call(T=40, N=16, dtype=dtype, states=2)
    call.w[:, 5] = torch.inf
    call.w[:, 7] = -torch.inf
    check(call)


def test_every_decay_has_a_finite_gradient():
    call = random_call(B=1, T=10, H=4, N=100)
    every = torch.cat([torch.linspace(-200, 200, 3998), torch.tensor([3e38, -3e38])])
    call.w = every[torch.randperm(4000)].view(1, 10, 4, 100)
    assert all(g.isfinite().all() for g in gradients(call, call.grad_outputs()))
    check(call)


def test_final_state_is_not_detached():
    call = random_call(states=2).leaves()
    y, state = wkv(*call.floats())
    assert y.requires_grad
    assert state.requires_grad


def test_gradient_through_a_carried_state():
    """Two pieces with a carried state have the gradient of the whole."""
    call = random_call(T=30, N=8, dtype=torch.float64, states=2).leaves()
    grad_y, grad_state = call.grad_outputs()
    whole = torch.autograd.grad(wkv(*call.floats()), call.differentiable(), (grad_y, grad_state))
    r, k, v, w, u, state = call.floats()
    y = []
    for piece in (slice(0, 11), slice(11, 12), slice(12, 30)):
        y_piece, state = wkv(r[:, piece], k[:, piece], v[:, piece], w[:, piece], u, state)
        y.append(y_piece)
    pieces = torch.autograd.grad(
        (torch.cat(y, 1), state), call.differentiable(), (grad_y, grad_state)
    )
    for a, b in zip(pieces, whole, strict=True):
        assert relative_rms(a, b) < 1e-13


def test_training_on_one_token():
    call = random_call(B=4, T=1, H=2, N=64, states=4)
    check(call)


def test_flat_u_through_a_view():
    call = random_call(H=3, N=8)
    u = call.u.flatten().requires_grad_()
    y, _ = wkv(call.r, call.k, call.v, call.w, u.view(3, 8))
    y.sum().backward()
    assert u.grad.shape == (24,)
    assert (u.grad != 0).any()


def test_expanded_input_gets_its_summed_gradient():
    call = random_call(N=8, dtype=torch.float64)
    w = call.w[:1, :1].clone().requires_grad_()
    y, _ = wkv(call.r, call.k, call.v, w.expand(call.r.shape), call.u)
    (found,) = torch.autograd.grad(y.sum(), w)
    call.w = w.detach().expand(call.r.shape).contiguous()
    full = gradients(call, (torch.ones_like(y), torch.zeros(2, 2, 8, 8, dtype=torch.float64)))[3]
    assert relative_rms(found, full.sum((0, 1), keepdim=True)) < 1e-13


def test_non_contiguous_gradient():
    call = random_call(N=8)
    grad_y, grad_state = call.grad_outputs()
    strided = grad_y.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for a, b in zip(gradients(call, (strided, grad_state)), gradients(call, (grad_y, grad_state))):
        assert torch.equal(a, b)


@pytest.mark.cpu
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "call",
    [
        random_call(B=1, T=600, H=1, N=100, states=1),
        random_call(B=5, T=64, H=3, N=64, states=2, state_map=[0, 1, 1, 0, 1]),
        random_call(B=1, T=400, H=3, N=40, states=1, cu_seqlens=[0, 100, 399, 400]),
    ],
    ids=["one head", "many heads", "packed"],
)
def test_gradients_do_not_depend_on_the_thread_count(call):
    grad_outputs = call.grad_outputs()
    two = gradients(call, grad_outputs)
    torch.set_num_threads(1)
    one = gradients(call, grad_outputs)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_gradients_are_what_small_ones_are(dtype):
    """From 8 MiB on they are stored past the caches: batch row by row they are not."""
    B, T, H, N = 2, 301 if dtype == torch.float32 else 601, 16, 64
    inputs = [torch.randn(B, T, H, N).to(dtype).requires_grad_() for _ in range(4)]
    u, grad_y = torch.randn(H, N, dtype=dtype), torch.randn(B, T, H, N).to(dtype)
    large = torch.autograd.grad(wkv(*inputs, u)[0], inputs, grad_y)
    nbytes = sum(x.nbytes for x in large)
    assert nbytes / B < 2**23 < nbytes
    for b in range(B):
        row = [x[b : b + 1] for x in inputs]
        small = torch.autograd.grad(wkv(*row, u)[0], row, grad_y[b : b + 1])
        for one, both in zip(small, large, strict=True):
            assert torch.equal(one[0], both[b])


MEMORY = """
import resource, sys, torch
from torch_rwkv6 import wkv
torch.set_num_threads(2)
B, T, H, N = 1, 32768, 1, 64
def call(T):
    x = [torch.randn(B, T, H, N) for _ in range(4)] + [torch.randn(H, N)]
    return [y.requires_grad_() for y in x]
def step(x):
    y, _ = wkv(*x)
    y.backward(torch.ones_like(y))
    return y
step(call(2048))
x = call(T)
gradients = [torch.zeros_like(p) for p in x]
for p, g in zip(x, gradients): p.grad = g
grad_y = torch.ones(B, T, H, N)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y, _ = wkv(*x)
torch.autograd.grad(y, x, grad_y)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
inputs = sum(p.numel() * 4 for p in x)
outputs = y.numel() * 4 + inputs  # y and the gradients
print((after - before) * 1024 - outputs, inputs)
"""


@pytest.mark.cpu
@pytest.mark.memory
def test_backward_needs_no_more_extra_memory_than_its_inputs():
    out = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=os.environ
    )
    extra, inputs = map(int, out.stdout.split())
    assert extra <= inputs


def flags_of_memory(address: int) -> list[str]:
    """What Linux says of the mapping that an address lies in; [] where it does not."""
    smaps = Path("/proc/self/smaps")
    inside = False
    for line in smaps.read_text().splitlines() if smaps.exists() else []:
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.cpu
def test_large_gradients_are_to_lie_on_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no transparent huge pages")
    call = random_call(B=1, T=512, H=32, N=64)  # 4 MiB
    gradients = torch.ops.rwkv6.wkv_backward(call.r, None, *call.args())
    # its middle, which is neither before the first nor behind the last whole page of 2 MiB
    flags = [flags_of_memory(x.data_ptr() + (2 << 20)) for x in gradients[:4]]
    if [] in flags:
        pytest.skip("this system does not say what its memory is like")
    assert all("hg" in f for f in flags)


@pytest.mark.cpu
@pytest.mark.usefixtures("two_threads")
def test_heads_whose_checkpoints_would_be_large_take_turns_in_groups():
    torch.set_num_threads(1)  # which then has all of them
    call = random_call(B=1, T=1030, H=8, N=256)  # 17 checkpoints of 256 KiB for each head
    gradients = torch.ops.rwkv6.wkv_backward(call.r, None, *call.args())
    for heads in (slice(0, 4), slice(3, 8)):
        r, k, v, w = (x[..., heads, :] for x in (call.r, call.k, call.v, call.w))
        some = torch.ops.rwkv6.wkv_backward(r, None, r, k, v, w, call.u[heads], None, None, None)
        for found, expected in zip(some[:5], gradients[:5], strict=True):
            assert torch.equal(found, expected[..., heads, :])
