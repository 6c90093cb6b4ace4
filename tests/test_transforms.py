"""Double backward, forward mode, torch.func: right (by the reference), never silently zero."""

import pytest
import torch
from samples import random_call, relative_rms, sample_inputs

from torch_rwkv6 import reference, wkv, wkv_update

SAMPLES = list(sample_inputs())


def function(call):
    return lambda *floats: torch.ops.rwkv6.wkv(
        *floats, *[None] * (6 - len(floats)), call.state_map, call.cu_seqlens
    )


def expected_function(call):
    return lambda *floats: reference.wkv(
        *floats, *[None] * (6 - len(floats)), call.state_map, call.cu_seqlens
    )


def double_sample(name):
    return sample_inputs(torch.float64, N=2, T=3)[name].double()


@pytest.mark.parametrize("name", SAMPLES)
def test_double_backward(name):
    call = double_sample(name).leaves()
    assert torch.autograd.gradgradcheck(function(call), call.differentiable())


def test_third_derivative():
    x = random_call(T=3, N=2, dtype=torch.float64).leaves()

    def third(f):
        y = f(*x.floats()[:5])[0].pow(2).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x.k, create_graph=True)
            y = g.pow(2).sum()
        return g.detach()

    expected = third(reference.wkv)
    assert expected.norm() > 0
    assert relative_rms(third(wkv), expected) < 1e-10


def test_double_backward_of_dependent_inputs():
    """k made from r: the second derivative must not count the path twice."""

    def value(f, r, call):
        y, _ = f(r, torch.tanh(r), call.v, call.w, call.u)
        (g,) = torch.autograd.grad(y.pow(2).sum(), r, create_graph=True)
        (gg,) = torch.autograd.grad(g.pow(2).sum(), r)
        return gg

    call = random_call(dtype=torch.float64)
    r = call.r.requires_grad_()
    assert relative_rms(value(wkv, r, call), value(reference.wkv, r, call)) < 1e-12


@pytest.mark.parametrize("name", SAMPLES)
def test_forward_mode(name):
    call = double_sample(name).leaves()
    assert torch.autograd.gradcheck(
        function(call), call.differentiable(), check_forward_ad=True, check_backward_ad=False
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_func_grad_vjp_jvp(name):
    call = double_sample(name)
    x = tuple(call.differentiable())
    tangents = tuple(torch.randn_like(a) for a in x)
    f, g = function(call), expected_function(call)

    def loss(h):
        return lambda *a: sum(out.sin().sum() for out in h(*a))

    every = tuple(range(len(x)))
    for found, expected in (
        (torch.func.grad(loss(f), every)(*x), torch.func.grad(loss(g), every)(*x)),
        (torch.func.vjp(loss(f), *x)[1](torch.tensor(2.0, dtype=torch.float64)),
         torch.func.vjp(loss(g), *x)[1](torch.tensor(2.0, dtype=torch.float64))),
        (torch.func.jvp(f, x, tangents)[1], torch.func.jvp(g, x, tangents)[1]),
    ):  # fmt: skip
        for a, b in zip(found, expected, strict=True):
            assert relative_rms(a, b) < 1e-12


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_jacobians(transform):
    call = random_call(B=1, T=3, H=1, N=2, dtype=torch.float64)

    def f(h):
        return lambda k: h(call.r, k, call.v, call.w, call.u)[0].pow(2).sum(-1)

    assert relative_rms(transform(f(wkv))(call.k), transform(f(reference.wkv))(call.k)) < 1e-12


def test_per_sample_gradients():
    call = random_call(B=3, T=6, N=4, dtype=torch.float64)

    def loss(u, r, k, v, w):
        return wkv(r[None], k[None], v[None], w[None], u)[0].pow(2).sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0, 0))(
        call.u, call.r, call.k, call.v, call.w
    )
    for b in range(3):
        u = call.u.clone().requires_grad_()
        loss(u, call.r[b], call.k[b], call.v[b], call.w[b]).backward()
        assert relative_rms(found[b], u.grad) < 1e-12


# Which of r, k, v, w, u, initial_state, state_map, cu_seqlens are mapped, and over which dimension.
@pytest.mark.parametrize(
    ("name", "in_dims"),
    [
        ("plain", (0, 0, 0, 0, None, None, None, None)),
        ("plain", (0, 1, 2, 3, 1, None, None, None)),
        ("plain", (None, None, 4, None, None, None, None, None)),
        ("plain", (None, None, None, None, 0, None, None, None)),
        ("state each", (0, None, 0, 0, None, 2, None, None)),
        ("state map", (None, None, None, None, None, 4, None, None)),
        ("state map", (0, 0, 0, 0, None, None, 0, None)),
        ("packed, state map", (0, 0, 0, 0, 0, 0, None, None)),
        ("packed", (0, None, 0, 0, None, None, None, 0)),
    ],
    ids=str,
)
def test_vmap_equals_a_loop(name, in_dims):
    call = sample_inputs(torch.float64)[name]
    args = list(call.args())
    size = 3
    for i, dim in enumerate(in_dims):
        if dim is not None:
            x = args[i]
            copies = torch.stack([x + (torch.randn_like(x) if x.is_floating_point() else 0)
                                  for _ in range(size)])  # fmt: skip
            args[i] = copies.movedim(0, dim)
    found = torch.vmap(torch.ops.rwkv6.wkv, in_dims=in_dims)(*args)
    grads = [torch.randn_like(x) for x in found]
    backward_dims = (0, 0, *in_dims)
    found_grads = torch.vmap(torch.ops.rwkv6.wkv_backward, in_dims=backward_dims)(*grads, *args)
    for i in range(size):
        one = [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]
        for a, b in zip(found, torch.ops.rwkv6.wkv(*one), strict=True):
            assert relative_rms(a[i], b) < 1e-13
        expected = torch.ops.rwkv6.wkv_backward(*(g[i] for g in grads), *one)
        for a, b in zip(found_grads, expected, strict=True):
            assert relative_rms(a[i], b) < 1e-12


def test_nested_vmap():
    call = random_call(dtype=torch.float64)
    r = torch.randn(2, 3, *call.r.shape, dtype=torch.float64)
    f = lambda r: wkv(r, call.k, call.v, call.w, call.u)[0]  # noqa: E731
    found = torch.vmap(torch.vmap(f))(r)
    for i in range(2):
        for j in range(3):
            assert relative_rms(found[i, j], f(r[i, j])) < 1e-13


def test_vmap_over_requires_grad_runs_backward():
    call = random_call(dtype=torch.float64)
    r = torch.randn(3, *call.r.shape, dtype=torch.float64, requires_grad=True)
    y = torch.vmap(lambda r: wkv(r, call.k, call.v, call.w, call.u)[0])(r)
    (found,) = torch.autograd.grad(y.pow(2).sum(), r)
    for i in range(3):
        x = r[i].detach().requires_grad_()
        (expected,) = torch.autograd.grad(wkv(x, call.k, call.v, call.w, call.u)[0].pow(2).sum(), x)
        assert relative_rms(found[i], expected) < 1e-12


def test_vmap_of_wkv_update_updates_the_mapped_state():
    call = random_call(states=2)
    r = torch.randn(3, *call.r.shape)
    states = torch.randn(2, 3, 2, 4, 4)
    expected_states = states.clone()
    f = lambda r, s: wkv_update(r, call.k, call.v, call.w, call.u, s)  # noqa: E731
    y = torch.vmap(f, in_dims=(0, 1))(r, states)
    for i in range(3):
        assert torch.equal(y[i], f(r[i], expected_states[:, i]))
    assert torch.equal(states, expected_states)


def test_vmap_of_wkv_update_over_a_shared_state_is_refused():
    call = random_call(states=2)
    r = torch.randn(3, *call.r.shape)
    with pytest.raises(RuntimeError, match="state that is not mapped"):
        torch.vmap(lambda r: wkv_update(r, *call.floats()[1:]))(r)


def reverse(r, call):
    wkv_update(r.requires_grad_(), *call.floats()[1:])


def forward(r, call):
    with torch.autograd.forward_ad.dual_level():
        wkv_update(torch.autograd.forward_ad.make_dual(r, torch.ones_like(r)), *call.floats()[1:])


def functional(r, call):
    torch.func.grad(lambda r: wkv_update(r, *call.floats()[1:]).sum())(r)


@pytest.mark.parametrize("derivative", [reverse, forward, functional])
def test_derivatives_of_wkv_update_are_refused(derivative):
    call = random_call(states=2)
    before = call.initial_state.clone()
    with pytest.raises(RuntimeError, match="has no derivative"):
        derivative(call.r, call)
    assert torch.equal(call.initial_state, before)


def test_saved_tensors_overwritten_in_place_are_noticed():
    call = random_call(states=2)
    x = call.initial_state.clone().requires_grad_()
    state = x * 1
    loss = (state * state).sum()
    with torch.no_grad():
        wkv_update(*call.floats()[:5], state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def reverse_functional(f, r):
    torch.func.grad(lambda r: f(r)[0].sum())(r)


def forward_dual(f, r):
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(r, torch.ones_like(r)))


BAD = {
    "cu_seqlens falls": {"cu_seqlens": torch.tensor([0, 3, 2, 5])},
    "cu_seqlens ends early": {"cu_seqlens": torch.tensor([0, 3])},
    "state_map": {"initial_state": torch.zeros(2, 2, 4, 4), "state_map": torch.tensor([2])},
    "u": {"u": torch.zeros(1, 4)},
    "k": {"k": torch.zeros(1, 5, 1, 4)},
}


# On a GPU no value is looked at: what a wrong one names is NaN there (test_gpu.py).
VALUES = ("cu_seqlens falls", "cu_seqlens ends early", "state_map")


@pytest.mark.parametrize("derivative", [reverse_functional, forward_dual])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.cpu] if n in VALUES else []) for n in BAD]
)
def test_bad_input_raises_inside_transforms_as_well(name, derivative):
    call = random_call(B=1, T=5)
    keywords = {"k": call.k, "v": call.v, "w": call.w, "u": call.u} | BAD[name]
    with pytest.raises((RuntimeError, ValueError), match=name.split()[0]):
        derivative(lambda r: torch.ops.rwkv6.wkv(r, **keywords), call.r)


def test_without_tokens_the_state_is_a_copy_also_inside_transforms():
    call = random_call(T=0, states=2)
    start = call.initial_state
    (_, state), _ = torch.func.vjp(lambda r: wkv(r, *call.floats()[1:]), call.r)
    assert torch.equal(state, start)
    assert state.data_ptr() != start.data_ptr()
    with torch.autograd.forward_ad.dual_level():
        r = torch.autograd.forward_ad.make_dual(call.r, torch.ones_like(call.r))
        _, state = wkv(r, *call.floats()[1:])
        assert state.data_ptr() != start.data_ptr()


@pytest.mark.parametrize("w", [6.0, 7.5, 79.0, torch.inf, -1e9])
def test_second_derivatives_of_extreme_decays_are_finite(w):
    call = random_call(T=4, N=3)
    floats = [100 * x for x in (call.r, call.k, call.v)] + [torch.full_like(call.w, w), call.u]
    floats = [x.requires_grad_() for x in floats]
    y, state = wkv(*floats)
    first = torch.autograd.grad((100 * y).sum() + state.sum(), floats, create_graph=True)
    second = torch.autograd.grad(
        sum(g.sum() for g in first), floats, allow_unused=True, materialize_grads=True
    )
    assert all(g.isfinite().all() for g in (*first, *second))


@pytest.mark.parametrize("mapped", ["r", "state_map"])
def test_vmap_over_nothing(mapped):
    call = random_call(states=2, state_map=[0, 1])
    args, dims = list(call.args()), [None] * 8
    i = {"r": 0, "state_map": 6}[mapped]
    args[i], dims[i] = args[i].new_empty((0, *args[i].shape)), 0
    y, state = torch.vmap(torch.ops.rwkv6.wkv, in_dims=tuple(dims))(*args)
    assert y.shape == (0, 2, 5, 2, 4)
    assert state.shape == (0, 2, 2, 4, 4)


def test_vmap_of_wkv_update_over_nothing():
    *inputs, state = random_call(states=2).floats()
    call = torch.vmap(lambda s: wkv_update(*inputs, s))
    assert call(state.new_empty((0, *state.shape))).shape == (0, 2, 5, 2, 4)
    with pytest.raises(ValueError, match="state: expected"):
        call(state.new_empty((0, *state.shape[:-1], 7)))


@pytest.mark.cpu
def test_vmap_of_wkv_update_changes_nothing_when_it_is_refused():
    call = random_call(states=2)
    states = torch.zeros(3, 2, 2, 4, 4)
    maps = torch.tensor([[0, 1], [0, 7], [0, 1]])
    with pytest.raises(RuntimeError, match="state_map"):
        torch.vmap(lambda s, m: wkv_update(*call.floats()[:5], s, state_map=m))(states, maps)
    assert (states == 0).all()


def test_vmap_of_wkv_update_over_an_expanded_state_is_refused():
    call = random_call(states=2)
    states = torch.zeros(1, 2, 2, 4, 4).expand(3, -1, -1, -1, -1)
    with pytest.raises(RuntimeError, match="expanded state"):
        torch.vmap(lambda s: wkv_update(*call.floats()[:5], s))(states)
