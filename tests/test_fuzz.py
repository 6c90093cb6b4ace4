"""Hypothesis: any shape, dtype, stride and option against the reference, forward and backward."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import FLOAT_DTYPES, Call, random_call, relative_rms

from torch_rwkv6 import reference, wkv, wkv_update

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def strided(draw, x: torch.Tensor) -> torch.Tensor:
    """x in other memory: the same values under other strides."""
    kind = draw(st.sampled_from(["contiguous", "permuted", "padded", "sliced", "transposed"]))
    if kind == "permuted":  # the last dimension stays contiguous
        order = [*draw(st.permutations(range(x.dim() - 1))), x.dim() - 1]
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if kind == "transposed":  # the last dimension does not
        return x.transpose(-1, 0).contiguous().transpose(-1, 0)
    if kind == "padded":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + draw(st.integers(1, 9))), torch.nan)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if kind == "sliced":
        wide = x.new_full((2 * x.shape[0] + 1, *x.shape[1:]), torch.nan)
        wide[1::2] = x
        return wide[1::2]
    return x


@st.composite
def calls(draw) -> Call:
    dtype = draw(st.sampled_from(FLOAT_DTYPES))
    packed = draw(st.booleans())
    B = 1 if packed else draw(st.integers(0, 4))
    T, H = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    N = draw(st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 100, 128, 256])))
    cuts = sorted(draw(st.lists(st.integers(0, T), max_size=4)))
    call = random_call(
        B, T, H, N, dtype,
        seed=draw(st.integers(0, 2**20)),
        extreme=draw(st.booleans()),
        w_dtype=draw(st.sampled_from([dtype, torch.float32])),
        cu_seqlens=[0, *cuts, T] if packed else None,
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )  # fmt: skip
    if draw(st.booleans()):
        call.u = call.u.float() if dtype != torch.float64 else call.u
    states = draw(st.sampled_from(["none", "one", "each", "map"]))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {"none": 0, "one": 1, "each": call.sequences, "map": draw(st.integers(1, 5))}[states]
    if states != "none":
        state = torch.randn(rows, H, N, N, dtype=torch.float64)
        call.initial_state = state.to(draw(st.sampled_from([acc, dtype])))
    if states == "map":
        row = st.integers(0, rows - 1)
        row_of = draw(st.lists(row, min_size=call.sequences, max_size=call.sequences))
        call.state_map = torch.tensor(
            row_of, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
        )
    return call.map(lambda x: draw(strided(x)))


@FUZZ
@given(st.data())
def test_forward_and_backward(data):
    call = data.draw(calls())
    before = [x.clone() for x in call.args() if x is not None]
    leaves = call.map(lambda x: x.detach().requires_grad_())
    outputs = wkv(*leaves.floats(), state_map=call.state_map, cu_seqlens=call.cu_seqlens)
    grads = [data.draw(strided(g)) for g in call.grad_outputs()]
    found = [*outputs, *torch.autograd.grad(outputs, leaves.differentiable(), grads)]
    exact = call.double()
    expected = [
        *reference.wkv(*exact.args()),
        *reference.wkv_backward(*(g.double() for g in grads), *exact.args()),
    ]
    names = ("y", "final_state", "r", "k", "v", "w", "u", "initial_state")
    for name, a, b in zip(names, found, expected, strict=False):
        assert a.shape == b.shape, name
        assert relative_rms(a, b) <= LIMITS[a.dtype], name
    after = [x for x in call.args() if x is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@FUZZ
@given(st.data())
def test_wkv_update(data):
    call = data.draw(calls())
    acc = torch.float64 if call.r.dtype == torch.float64 else torch.float32
    rows = call.sequences + data.draw(st.integers(0, 3))
    pool = torch.randn(rows, *call.r.shape[2:], call.r.shape[3], dtype=acc)
    slots = torch.randperm(rows)[: call.sequences]
    slots[torch.rand(call.sequences) < 0.2] = -1
    start = pool if rows else None
    expected_y, expected_state = wkv(
        *call.floats()[:5],
        start,
        state_map=slots.clamp(min=0) if rows else None,
        cu_seqlens=call.cu_seqlens,
    )
    state = pool.clone()
    y = wkv_update(*call.floats()[:5], state, state_map=slots, cu_seqlens=call.cu_seqlens)
    used = slots >= 0
    assert torch.equal(state[slots[used]], expected_state[used])
    untouched = torch.ones(rows, dtype=torch.bool)
    untouched[slots[used]] = False
    assert torch.equal(state[untouched], pool[untouched])
    if call.cu_seqlens is None:
        assert torch.equal(y[used], expected_y[used])
        assert (y[~used] == 0).all()


shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
dtypes = st.sampled_from(
    [*FLOAT_DTYPES, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64]
)


@FUZZ
@given(st.data())
def test_arguments_of_any_shape_and_dtype_never_crash(data):
    """Whatever comes, the raw operators return or raise; the wrong ones raise."""
    call = random_call(B=2, T=3, H=2, N=4, states=2)
    grad_y, grad_state = call.grad_outputs()
    arguments = [grad_y, grad_state, *call.args()]
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(arguments) - 1))
        arguments[index] = torch.ones(data.draw(shapes), dtype=data.draw(dtypes))
    for op, args in (
        (torch.ops.rwkv6.wkv, arguments[2:]),
        (torch.ops.rwkv6.wkv_backward, arguments),
        (torch.ops.rwkv6.wkv_update, arguments[2:]),
    ):
        message, outputs = "", None
        try:
            outputs = op(*args)
        except (RuntimeError, ValueError, TypeError) as error:
            message = str(error)
        if outputs is None:
            assert ": " in message
            continue
        first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        assert first.shape == args[2 if op is torch.ops.rwkv6.wkv_backward else 0].shape


@pytest.mark.cpu
@pytest.mark.parametrize("values", [[-(2**62), 2**62], [2**31, 0], [-1, 0]])
def test_wild_indices_are_refused(values):
    call = random_call(states=2)
    with pytest.raises(RuntimeError, match="state_map"):
        wkv(*call.floats(), state_map=torch.tensor(values))
    call = random_call(B=1, T=3)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        wkv(*call.floats(), cu_seqlens=torch.tensor([0, *values, 3]))
