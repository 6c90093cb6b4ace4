"""Under autograd the forward keeps some of its states, and the backward starts from them."""

import itertools

import pytest
import torch
from samples import FLOAT_DTYPES, Call, random_call, relative_rms

import torch_rwkv6
from torch_rwkv6 import chunked, reference, wkv
from torch_rwkv6.contract import CHECKPOINT_TOKENS

pytestmark = pytest.mark.skipif(not torch_rwkv6.has_kernels, reason="there is no binary")

# the states and each gradient; the exact answer rounded to bfloat16 costs 1.66e-3
STATES = {torch.float64: 1e-14, torch.float32: 1e-6}
GRADIENTS = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 2.5e-3,
    torch.float16: 3.2e-4,
}
PACKED = [0, 5, 5, 134, 262, 391, 650]  # the shortest has no checkpoint, the longest two
FORMS = {
    "no state": {},
    "shared state": {"states": 1},
    "state each": {"states": 2},
    "state map": {"B": 3, "states": 2, "state_map": [1, 0, 1]},
    "packed": {"B": 1, "T": 650, "cu_seqlens": PACKED},
    "packed, state map": {
        **{"B": 1, "T": 650, "cu_seqlens": PACKED},
        **{"states": 2, "state_map": [1, 0, 1, 1, 0, 0]},
    },
}


def call_of(form: str, dtype: torch.dtype = torch.float32, **options) -> Call:
    return random_call(
        **{"T": 300, "N": 8, "dtype": dtype, "extreme": True, **FORMS[form], **options}
    )


def before(call: Call):
    """(batch row, first token, token, sequence) of every checkpoint."""
    B, T = call.r.shape[:2]
    offsets = [0, T] if call.cu_seqlens is None else call.cu_seqlens.tolist()
    for b in range(B):
        for m, (begin, end) in enumerate(itertools.pairwise(offsets)):
            for token in range(CHECKPOINT_TOKENS, end - begin, CHECKPOINT_TOKENS):
                yield b, begin, token, m if B == 1 else b


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_are_the_states_before_their_tokens(form, dtype):
    call = call_of(form, dtype)
    y, final_state, checkpoints = torch.ops.rwkv6.wkv_checkpointed(*call.args())
    assert all(map(torch.equal, (y, final_state), torch.ops.rwkv6.wkv(*call.args())))
    B, T, H, N = call.r.shape
    rows = T // CHECKPOINT_TOKENS
    assert checkpoints.shape == (B * rows + 2, H, N, N)
    exact = call.double()
    initial = reference.initial_states(
        exact.r, exact.initial_state, exact.state_map, exact.cu_seqlens
    )
    seen = set()
    for b, begin, token, sequence in before(call):
        now = slice(begin, begin + token)
        prefix = (x[b : b + 1, now] for x in (exact.r, exact.k, exact.v, exact.w))
        _, expected = reference.recurrence(*prefix, exact.u, initial[sequence : sequence + 1])
        row = b * rows + (begin + token) // CHECKPOINT_TOKENS - 1
        assert relative_rms(checkpoints[row], expected[0]) <= STATES[checkpoints.dtype]
        assert row not in seen
        seen.add(row)
    assert len(seen) >= 4


@pytest.mark.parametrize("given", ["both", "y", "final_state"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, dtype, given):
    call = call_of(form, dtype).leaves()
    grads = [
        g if given in ("both", name) else None
        for name, g in zip(("y", "final_state"), call.grad_outputs(), strict=True)
    ]
    outputs = wkv(*call.floats(), state_map=call.state_map, cu_seqlens=call.cu_seqlens)
    assert outputs[0].grad_fn.name() == "rwkv6_wkvBackward"
    which = [i for i, g in enumerate(grads) if g is not None]
    found = torch.autograd.grad(
        [outputs[i] for i in which], call.differentiable(), [grads[i] for i in which]
    )
    exact = [None if g is None else g.double() for g in grads]
    # float64 in plain PyTorch, which tests/test_chunked.py compares with the recurrence
    expected = chunked.wkv_backward(*exact, *call.double().args())
    for x, g, e in zip(call.differentiable(), found, expected, strict=False):
        assert relative_rms(g, e) <= 1.5 * GRADIENTS[x.dtype]


@pytest.mark.parametrize("heads", [1, 3, 40])
@pytest.mark.parametrize("N", [1, 20, 32, 64, 100])
def test_gradients_of_any_head_size_and_number(N, heads):
    """Few heads are cut in parts of their columns, many go through the tokens together."""
    call = random_call(B=1, T=260, H=heads if N < 64 else min(heads, 3), N=N, states=1)
    grads = call.grad_outputs()
    *_, checkpoints = torch.ops.rwkv6.wkv_checkpointed(*call.args())
    found = torch.ops.rwkv6.wkv_checkpointed_backward(*grads, checkpoints, *call.args())
    expected = torch.ops.rwkv6.wkv_backward(*grads, *call.args())
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(a, b) <= 1e-6


def test_what_is_saved_for_the_backward():
    """The inputs, not copied, and the checkpoints."""
    # what a GPU has a kernel for that starts from checkpoints
    call = random_call(B=2, T=300, H=3, N=32, dtype=torch.bfloat16, states=2).leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        wkv(*call.floats())
    inputs = {x.data_ptr() for x in call.differentiable()}
    (checkpoints,) = (x for x in saved if x.data_ptr() not in inputs)
    assert checkpoints.shape == (2 * 2 + 2, 3, 32, 32)


def test_second_derivatives():
    call = random_call(B=1, T=130, H=1, N=2, dtype=torch.float64, states=1)
    cotangents = [torch.randn_like(x) for x in call.differentiable()]

    def second(function):
        inputs = call.leaves()
        first = torch.autograd.grad(
            function(inputs), inputs.differentiable(), [g.sin() for g in fixed], create_graph=True
        )
        return torch.autograd.grad(first, inputs.differentiable(), cotangents)

    fixed = call.grad_outputs()
    found = second(lambda x: wkv(*x.floats()))
    expected = second(lambda x: reference.wkv(*x.args()))
    for a, b in zip(found, expected, strict=True):
        assert relative_rms(a, b) <= 1e-12


@pytest.mark.parametrize("form", ["state each", "packed"])
def test_many_gradients_at_once(form):
    call = call_of(form).leaves()
    y, _ = wkv(*call.floats(), state_map=call.state_map, cu_seqlens=call.cu_seqlens)
    grads = torch.randn(3, *y.shape)
    inputs = call.differentiable()
    together = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(grads):
        alone = torch.autograd.grad(y, inputs, g, retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            assert relative_rms(a[i], b) <= 1e-6


def test_compiled_for_any_length():
    compiled = torch.compile(wkv, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (40, 300):
        call = random_call(B=2, T=T, N=8, states=2)
        grads = call.grad_outputs()
        results = []
        for function in (compiled, wkv):
            x = call.leaves()
            results.append(torch.autograd.grad(function(*x.floats()), x.differentiable(), grads))
        for a, b in zip(*results, strict=True):
            assert relative_rms(a, b) <= 1e-6


@pytest.mark.parametrize("options", [FORMS["state map"], {"B": 1, "cu_seqlens": [0, 300]}])
def test_opcheck(options):
    call = random_call(T=300, N=8, **options)
    # not what compares results: rows of no state are left unwritten
    checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
    forward = torch.ops.rwkv6.wkv_checkpointed.default
    torch.library.opcheck(forward, call.args(), test_utils=checks)
    *_, checkpoints = torch.ops.rwkv6.wkv_checkpointed(*call.args())
    arguments = (*call.grad_outputs(), checkpoints, *call.args())
    torch.library.opcheck(torch.ops.rwkv6.wkv_checkpointed_backward.default, arguments)


def test_checkpoints_of_another_shape_are_refused():
    call = call_of("state each")
    *_, checkpoints = torch.ops.rwkv6.wkv_checkpointed(*call.args())
    for wrong in (checkpoints[3:], checkpoints[..., :4], checkpoints.double()):
        with pytest.raises(RuntimeError, match="checkpoints: expected"):
            torch.ops.rwkv6.wkv_checkpointed_backward(*call.grad_outputs(), wrong, *call.args())
