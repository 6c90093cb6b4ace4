"""RWKV-4's operator: forward, backward, in place, transforms, errors, against its recurrence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import relative_rms
from torch import Tensor

from torch_rwkv6 import reference4, wkv4, wkv4_update

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
SIZES = [(2, 7, 5), (1, 40, 70), (3, 1, 130), (2, 0, 3), (1, 100, 16), (2, 3, 300)]  # B, T, D


def call(
    B: int, T: int, D: int, dtype: torch.dtype = torch.float32, state: bool = True, scale: float = 3
) -> list[Tensor | None]:
    """k, v, w, u and a state (a, b, p), rounded to dtype."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inputs = [(normal(B, T, D) * scale).to(dtype), normal(B, T, D).to(dtype)]
    inputs += [(normal(D) - 1).to(dtype), normal(D).to(dtype)]
    if not state:
        return [*inputs, None]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    own = torch.stack((normal(B, D), normal(B, D).exp(), normal(B, D)), 1)
    return [*inputs, own.to(acc)]


def double(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in inputs]


def naive(k: np.ndarray, v: np.ndarray, w: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The article's formula, without the stable form: [T, D] each."""
    num, den, rows = np.zeros(k.shape[1]), np.zeros(k.shape[1]), []
    for k_t, v_t in zip(k, v, strict=True):
        rows.append((num + np.exp(u + k_t) * v_t) / (den + np.exp(u + k_t)))
        num = np.exp(-np.exp(w)) * num + np.exp(k_t) * v_t
        den = np.exp(-np.exp(w)) * den + np.exp(k_t)
    return np.stack(rows)


def test_the_reference_is_the_formula() -> None:
    k, v, w, u, _ = call(2, 20, 6, torch.float64, state=False, scale=1)
    y, _ = reference4.wkv4(k, v, w, u)
    for b in range(2):
        expected = naive(*(x.numpy() for x in (k[b], v[b], w, u)))
        np.testing.assert_allclose(y[b].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("state", [False, True], ids=["start", "state"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(
    dtype: torch.dtype, size: tuple[int, int, int], state: bool, two_threads: None
) -> None:
    inputs = call(*size, dtype, state)
    y, final = wkv4(*inputs)
    expected = reference4.wkv4(*double(inputs))
    assert y.dtype == dtype
    assert final.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_rms(y, expected[0]) < TOLERANCE[dtype]
    assert relative_rms(final, expected[1]) < max(1e-14, min(TOLERANCE[dtype], 2e-6))
    grads = torch.randn_like(y), torch.randn_like(final)
    found = torch.ops.rwkv6.wkv4_backward(*grads, *inputs)
    wanted = reference4.wkv4_backward(*(g.double() for g in grads), *double(inputs))
    for name, x, exact in zip("kvwus", found, wanted, strict=True):
        assert relative_rms(x, exact) < TOLERANCE[dtype], name


def test_a_long_text_and_extreme_values() -> None:
    inputs = call(1, 3000, 20, scale=30)
    inputs[2][:6] = torch.tensor([-1e9, -90.0, 5.0, 20.0, 90.0, torch.inf])
    inputs[0][:, 100:200] += 1e4
    y, final = wkv4(*inputs)
    exact, _ = reference4.wkv4(*double(inputs))
    assert y.isfinite().all()
    assert relative_rms(y, exact) < 2e-3  # exponents of 1e4 are rounded to 1e-3 in float32
    grads = torch.ops.rwkv6.wkv4_backward(torch.randn_like(y), torch.zeros_like(final), *inputs)
    assert all(g.isfinite().all() for g in grads)


def test_threads_and_strides_give_the_same_bits(two_threads: None) -> None:
    k, v, w, u, state = call(3, 50, 200)
    wide = torch.randn(3, 50, 512)
    wide[..., 7:207], wide[..., 300:500] = k, v
    expected = wkv4(k, v, w, u, state)
    torch.set_num_threads(1)
    for x, y in zip(wkv4(wide[..., 7:207], wide[..., 300:500], w, u, state), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("state", [False, True], ids=["start", "state"])
def test_gradcheck(state: bool) -> None:
    leaves = [x.requires_grad_() for x in call(2, 4, 3, torch.float64, state, 1) if x is not None]
    assert torch.autograd.gradcheck(wkv4, leaves)
    assert torch.autograd.gradgradcheck(wkv4, leaves)


@pytest.mark.parametrize("state", [False, True], ids=["start", "state"])
def test_opcheck(state: bool) -> None:
    k, v, w, u, s = call(2, 2, 3, state=state)
    leaves = [None if x is None else x.requires_grad_() for x in (k, v, w, u, s)]
    torch.library.opcheck(torch.ops.rwkv6.wkv4.default, leaves)
    grads = torch.randn(2, 2, 3, requires_grad=True), torch.randn(2, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.rwkv6.wkv4_backward.default, (*grads, *leaves))
    torch.library.opcheck(torch.ops.rwkv6.wkv4_backward.default, (None, None, *leaves))
    if s is not None:
        plain = [x.detach().clone() for x in (k, v, w, u, s)]
        torch.library.opcheck(torch.ops.rwkv6.wkv4_update.default, plain)
    torch.library.opcheck(torch.ops.rwkv6.matvec.default, (torch.randn(2, 5), torch.randn(3, 5)))


def test_transforms() -> None:
    k, v, w, u, s = call(2, 4, 3, torch.float64)
    inputs = (k, v, w, u, s)
    expected = torch.autograd.functional.jacobian(lambda x: wkv4(x, v, w, u, s)[0], k)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(lambda x: wkv4(x, v, w, u, s)[0])(k), expected)
    many = [torch.stack((x, x * 0.5, x * 0.1)) for x in inputs]
    for dims in ((0, 0, None, None, None), (0, 0, 0, 0, 0), (None, 0, None, 0, None)):
        chosen = [m if d == 0 else x for m, x, d in zip(many, inputs, dims, strict=True)]
        y, final = torch.vmap(wkv4, in_dims=dims)(*chosen)
        for i in range(3):
            one = wkv4(*(m[i] if d == 0 else x for m, x, d in zip(many, inputs, dims, strict=True)))
            torch.testing.assert_close((y[i], final[i]), one)


def test_vmap_of_wkv4_update_updates_the_mapped_state() -> None:
    k, v, w, u = call(2, 3, 4)[:4]
    keys, states = torch.randn(3, *k.shape), torch.rand(3, k.shape[0], 3, k.shape[2])
    expected = states.clone()
    y = torch.vmap(lambda k, s: wkv4_update(k, v, w, u, s))(keys, states)
    for i in range(3):
        assert torch.equal(y[i], wkv4_update(keys[i], v, w, u, expected[i]))
    assert torch.equal(states, expected)
    with pytest.raises(RuntimeError, match=r"state that is not mapped.*or use rwkv6::wkv4$"):
        torch.vmap(lambda k: wkv4_update(k, v, w, u, states[0]))(keys)


def test_pieces_and_in_place() -> None:
    k, v, w, u, s = call(2, 9, 6)
    whole, last = wkv4(k, v, w, u, s)
    own, pieces = s.clone(), []
    for kp, vp in zip(k.split([4, 0, 1, 4], 1), v.split([4, 0, 1, 4], 1), strict=True):
        pieces.append(wkv4_update(kp, vp, w, u, own))
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(own, last)
    with pytest.raises(RuntimeError, match=r"wkv4_update overwrites its state.*use rwkv6::wkv4"):
        wkv4_update(k.clone().requires_grad_(), v, w, u, own)
    saved = s.clone().requires_grad_()
    product = (saved * 2).square()  # keeps saved * 2 for its backward
    assert product.requires_grad
    base = torch.randn(2, 3, 6, requires_grad=True)
    doubled = base * 2
    out = doubled.square().sum()
    wkv4_update(k, v, w, u, doubled.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    assert torch.equal(own, last)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: torch.zeros(2, 3)}, ValueError, r"k: expected 3 dimensions \[B, T, D\]"),
        ({0: [1]}, TypeError, r"k: expected a torch\.Tensor, got list"),
        ({0: torch.zeros(2, 3, 4, dtype=torch.int8)}, TypeError, "k: expected torch.float64"),
        ({1: torch.zeros(2, 3, 5)}, ValueError, "v: expected the shape of k"),
        ({1: torch.zeros(2, 3, 4).double()}, TypeError, "v: .* beside k of torch.float32"),
        ({2: torch.zeros(3)}, ValueError, r"w: expected \[D\] = \(4,\)"),
        ({3: torch.zeros(1, 4)}, ValueError, r"u: expected \[D\]"),
        ({3: torch.zeros(4, device="meta")}, ValueError, "u: expected device cpu like k"),
        ({4: torch.zeros(1, 3, 4)}, ValueError, r"state: expected \[B, 3, D\] = \(2, 3, 4\)"),
        ({4: torch.zeros(2, 3, 4).bfloat16()}, TypeError, "state: expected torch.float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_errors(
    changes: dict[int, object], error: type[Exception], message: str, autocast: bool
) -> None:
    inputs = call(2, 3, 4)
    for i, value in changes.items():
        inputs[i] = value
    for op in (wkv4, wkv4_update):
        with pytest.raises(error, match=message), torch.autocast("cpu", enabled=autocast):
            op(*inputs)


def test_the_state_to_update_is_not_optional() -> None:
    *inputs, _ = call(2, 3, 4)
    with pytest.raises(TypeError, match=r"state: expected a torch\.Tensor, got NoneType"):
        wkv4_update(*inputs, None)


def test_states_that_cannot_be_updated_in_place() -> None:
    k, v, w, u, s = call(2, 3, 4)
    with pytest.raises(ValueError, match="expanded view"):
        wkv4_update(k, v, w, u, s[:1].expand(2, 3, 4))
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        wkv4_update(k, v, w, u, torch.zeros(2, 4, 3).transpose(1, 2))
    with pytest.raises(RuntimeError, match="shares memory with k"):
        wkv4_update(s, v, w, u, s)


# ---- the product of a weight with a few vectors


@pytest.mark.parametrize(
    "sizes", [(1, 77, 45), (3, 64, 33), (9, 5, 1), (4, 1, 70), (2, 0, 3)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matvec(dtype: torch.dtype, sizes: tuple[int, int, int], two_threads: None) -> None:
    m, k, n = sizes
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    found = torch.ops.rwkv6.matvec(x, weight)
    assert found.dtype == dtype
    assert relative_rms(found, x.double() @ weight.double().T) < TOLERANCE[dtype]
    large, weight = torch.randn(m, 700).to(dtype), torch.randn(1000, 700).to(dtype)
    found = torch.ops.rwkv6.matvec(large, weight)
    torch.set_num_threads(1)
    assert torch.equal(torch.ops.rwkv6.matvec(large, weight), found)
    assert torch.equal(torch.ops.rwkv6.matvec(large[:1], weight[5:6]), found[:1, 5:6])


def test_matvec_has_derivatives() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch.ops.rwkv6.matvec, (x, weight), check_forward_ad=True)


def test_matvec_errors() -> None:
    matvec = torch.ops.rwkv6.matvec
    with pytest.raises(RuntimeError, match=r"weight: expected shape \[-1, 4\]"):
        matvec(torch.zeros(1, 4), torch.zeros(3, 5))
    with pytest.raises(RuntimeError, match="weight: expected float32, got bfloat16"):
        matvec(torch.zeros(1, 4), torch.zeros(3, 4).bfloat16())
    with pytest.raises(RuntimeError, match=r"x: expected shape"):
        matvec(torch.zeros(4), torch.zeros(3, 4))


def test_strided_and_expanded_vectors() -> None:
    """A column of a matrix, or one number for all channels: the same numbers and gradients."""
    D = 5
    k, v = torch.randn(2, 7, D), torch.randn(2, 7, D)
    column = torch.randn(D, 2, requires_grad=True)
    number = torch.randn(1, requires_grad=True)
    for w, u in ((column[:, 0], number.expand(D)), (number.expand(D), column[:, 0])):
        dense = [w.detach().clone().requires_grad_(), u.detach().clone().requires_grad_()]
        y, state = wkv4(k, v, w, u)
        expected = wkv4(k, v, *dense)
        assert torch.equal(y, expected[0])
        assert torch.equal(state, expected[1])
        found = torch.autograd.grad(y.square().sum(), (column, number))
        of_w, of_u = torch.autograd.grad(expected[0].square().sum(), dense)
        of_column, of_number = (of_w, of_u) if w.stride(0) == 2 else (of_u, of_w)
        torch.testing.assert_close(found[0][:, 0], of_column)
        torch.testing.assert_close(found[1], of_number.sum(0, keepdim=True))
        with torch.no_grad():
            assert torch.equal(wkv4_update(k, v, w, u, state.clone()), wkv4(k, v, *dense, state)[0])
