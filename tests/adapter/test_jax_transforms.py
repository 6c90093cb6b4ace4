"""Every JAX transform over the native kernels, against the same transform of the recurrence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import random_inputs

import keras_adapter
from keras_adapter import RWKVKernelOperator, _library
from keras_adapter.backends import jax as backend
from keras_adapter.ops import wkv

pytestmark = pytest.mark.skipif(
    not keras_adapter.has_kernels, reason="the XLA binding is not built"
)


ON_THE_CPU = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="on a GPU no value is looked at: such states are NaN"
)


def scanned(r, k, v, w, u, state):
    """WKV as jax.lax.scan over tokens: the oracle, under any transform of JAX."""

    def step(S, x):
        r, k, v, w = x
        kv = k[..., :, None] * v[..., None, :]
        y = jnp.einsum("bhi,bhij->bhj", r, S + u[:, :, None] * kv)
        return jnp.exp(-jnp.exp(w))[..., None] * S + kv, y

    state, y = jax.lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in (r, k, v, w)])
    return jnp.moveaxis(y, 0, 1), state


def inputs(B=2, T=9, H=2, N=4):
    return tuple(jnp.asarray(x) for x in random_inputs(B, T, H, N, states=B, extreme=False))


def stacked(x, n):
    """n different copies of every input."""
    return tuple(jnp.stack([a * (1 + 0.1 * i) for i in range(n)]) for a in x)


def loss(f):
    def of(*x):
        y, state = f(*x)
        return jnp.sin(y).sum() + (state**2).sum()

    return of


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), rtol=2e-4, atol=2e-4)


GRAD = range(6)
X = inputs()
X3 = stacked(X, 3)
X23 = stacked(X3, 2)


@pytest.mark.parametrize(
    "mapped",
    [(0,) * 6, (0, 0, 0, 0, None, 0), (None,) * 4 + (0, None), (None, 0, None, None, None, None)],
)
@pytest.mark.parametrize("jit", [True, False])
def test_vmap_of_any_operand(mapped, jit):
    x = tuple(many if axis == 0 else one for axis, many, one in zip(mapped, X3, X))
    f = jax.vmap(wkv, mapped)
    assert_close((jax.jit(f) if jit else f)(*x), jax.vmap(scanned, mapped)(*x))


def test_vmap_over_other_axes_and_of_vmap():
    x = tuple(jnp.moveaxis(a, 0, 1) for a in X3)
    assert_close(jax.vmap(wkv, 1)(*x), jax.vmap(scanned, 1)(*x))
    assert_close(jax.vmap(jax.vmap(wkv))(*X23), jax.vmap(jax.vmap(scanned))(*X23))


@pytest.mark.parametrize("axis_of_u", [0, None])
def test_gradient_of_vmap_and_vmap_of_gradient(axis_of_u):
    axes = (0, 0, 0, 0, axis_of_u, 0)
    x = (*X3[:4], X3[4] if axis_of_u == 0 else X[4], X3[5])

    def of_vmap(f):
        return jax.jit(jax.grad(loss(jax.vmap(f, axes)), GRAD))

    def of_gradient(f):  # per-example gradients, of a shared u as well
        return jax.jit(jax.vmap(jax.grad(loss(f), GRAD), axes))

    assert_close(of_vmap(wkv)(*x), of_vmap(scanned)(*x))
    assert_close(of_gradient(wkv)(*x), of_gradient(scanned)(*x))


@pytest.mark.parametrize("high_level", [False, True])
def test_vmap_over_nothing(high_level):
    """Sizes of 0: of the mapped axis, and of the batch under it."""
    f = partial(wkv, high_level=high_level)
    # compiled as one: the operations of keras.ops take long one by one
    jit = jax.jit if high_level else lambda f: f
    none = tuple(x[:0] for x in X3)
    assert [x.shape for x in jit(jax.vmap(f))(*none)] == [(0, 2, 9, 2, 4), (0, 2, 2, 4, 4)]
    for gradient in (jax.vmap(jax.grad(loss(f), GRAD)), jax.grad(loss(jax.vmap(f)), GRAD)):
        assert [x.shape for x in jit(gradient)(*none)] == [x.shape for x in none]
    empty = tuple(x if x.ndim == 3 else x[:, :0] for x in X3)
    y, state = jit(jax.vmap(f))(*empty)
    assert (y.shape, state.shape) == ((3, 0, 9, 2, 4), (3, 0, 2, 4, 4))


def test_vmap_over_the_state_map():
    maps, states = jnp.asarray([[0, 2], [1, 1]]), inputs(B=3)[5]
    expected = [scanned(*X[:5], states[m]) for m in maps]
    found = jax.vmap(lambda m: wkv(*X[:5], states, state_map=m))(maps)
    assert_close(found, [jnp.stack(x) for x in zip(*expected)])


def test_value_and_grad_remat_and_scan():
    expected = jax.value_and_grad(loss(scanned), GRAD)(*X)
    assert_close(jax.value_and_grad(loss(wkv), GRAD)(*X), expected)
    assert_close(jax.jit(jax.value_and_grad(loss(jax.checkpoint(wkv)), GRAD))(*X), expected)

    def layers(f):
        def run(r):
            return jax.lax.scan(lambda c, _: (f(c, *X[1:])[0], None), r, None, length=3)[0].sum()

        return jax.jit(jax.value_and_grad(run))

    assert_close(layers(wkv)(X[0]), layers(scanned)(X[0]))


def test_second_derivative():
    def double(f):
        def penalty(*x):
            return sum((g**2).sum() for g in jax.grad(loss(f), GRAD)(*x))

        return jax.jit(jax.grad(penalty, GRAD))

    x = inputs(B=1, T=3, H=1, N=2)
    found, expected = double(wkv)(*x), double(scanned)(*x)
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(jnp.abs(b).max()))


def test_forward_mode_is_refused_and_is_there_in_the_high_level_implementation():
    x = inputs(B=1, T=3, H=1, N=2)
    forward_mode = {
        "jvp": lambda f, wrap: wrap(lambda *x: jax.jvp(f, x, x))(*x),
        "jacfwd": lambda f, wrap: wrap(jax.jacfwd(loss(f), GRAD))(*x),
        "linearize": lambda f, wrap: wrap(lambda *x: jax.linearize(f, *x)[1](*x))(*x),
        "hessian": lambda f, wrap: wrap(jax.hessian(loss(f)))(*x),
    }
    for name, run in forward_mode.items():
        for wrap in (jax.jit, lambda f: f):
            with pytest.raises(TypeError, match=r"no forward-mode derivatives .*high_level=True"):
                run(wkv, wrap)
        found = run(partial(wkv, high_level=True), jax.jit)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(run(scanned, jax.jit))):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3, err_msg=name)


def test_no_state_no_gradient_of_the_final_state():
    def of(f):
        return jax.grad(lambda *x: f(*x)[0].sum(), range(5))

    zeros = jnp.zeros_like(X[5])
    assert_close(of(wkv)(*X[:5]), of(lambda *x: scanned(*x, zeros))(*X[:5]))


def test_a_donated_state_is_updated_in_place():
    decode = jax.jit(lambda *x: wkv(*x), donate_argnums=5)
    expected = scanned(*X)
    state = X[5] + 0
    address = state.unsafe_buffer_pointer()
    y, final = decode(*X[:5], state)
    assert state.is_deleted()
    assert final.unsafe_buffer_pointer() == address
    assert_close((y, final), expected)
    hlo = decode.lower(*X).compile().as_text()
    assert "output_to_operand_aliasing" in hlo
    assert "copy(" not in hlo


def test_a_state_that_is_not_donated_stays():
    state = X[5] + 0
    jax.jit(wkv)(*X[:5], state)
    np.testing.assert_array_equal(state, X[5])


def test_inputs_are_read_and_outputs_written_without_a_copy():
    hlo = jax.jit(wkv).lower(*X[:5]).compile().as_text()
    for operation in ("copy(", "transpose(", "concatenate("):
        assert operation not in hlo, hlo


def exported(f, *x, **options):
    """f after it was written down and read again; JAX must be told to let custom calls pass."""
    allow = jax.export.DisabledSafetyCheck.custom_call
    names = ("rwkv6_xla_forward", "rwkv6_xla_backward")
    written = jax.export.export(jax.jit(f), disabled_checks=[allow(name) for name in names])(*x)
    return jax.export.deserialize(written.serialize(**options))


def test_export():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in X]
    assert_close(exported(wkv, *shapes).call(*X), scanned(*X))


def test_high_level_products_are_no_tf32():
    f = jax.value_and_grad(loss(partial(wkv, high_level=True)), GRAD)
    graph = str(jax.make_jaxpr(f)(*X))
    assert graph.count("dot_general") == graph.count("precision=(Precision.HIGHEST,") > 5


def test_export_of_any_batch_and_length():
    B, T = jax.export.symbolic_shape("b, t")
    shapes = [jax.ShapeDtypeStruct((B, T, 2, 4), jnp.float32)] * 4
    shapes += [jax.ShapeDtypeStruct((2, 4), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((B, 2, 4, 4), jnp.float32)]
    loaded = exported(wkv, *shapes)
    for B, T in ((2, 9), (3, 17)):
        x = inputs(B, T)
        assert_close(loaded.call(*x), scanned(*x))


def test_export_of_any_batch_and_length_without_our_kernels():
    """High level: a graph of JAX's own operations, with gradients; no check is disabled."""
    B, T = jax.export.symbolic_shape("b, t")
    shapes = [jax.ShapeDtypeStruct((B, T, 2, 4), jnp.float32)] * 4
    shapes += [jax.ShapeDtypeStruct((2, 4), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((3, 2, 4, 4), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((B,), jnp.int32)]
    f = jax.jit(lambda *x: wkv(*x[:6], state_map=x[6], high_level=True))
    loaded = jax.export.deserialize(jax.export.export(f)(*shapes).serialize(vjp_order=1))
    for B, T in ((2, 9), (1, 1), (2, 70)):
        *x, states = inputs(B, T)[:5] + inputs(3)[5:]
        index = jnp.asarray([2, 0][:B])
        assert_close(loaded.call(*x, states, index), scanned(*x, states[index]))
    found = jax.grad(loss(lambda *x: loaded.call(*x, index)), GRAD)(*x, states)
    assert_close(found, jax.grad(loss(lambda *x: scanned(*x[:5], x[5][index])), GRAD)(*x, states))


@pytest.mark.parametrize("high_level", [False, True])
def test_export_of_the_operator(high_level):
    """The recipe of README.md: over (B, T, C), any batch and length."""
    B, T = jax.export.symbolic_shape("b, t")
    operator = RWKVKernelOperator(4, high_level=high_level)
    tokens = jax.ShapeDtypeStruct((B, T, 8), jnp.float32)
    shapes = [*[tokens] * 4, jax.ShapeDtypeStruct((8,), jnp.float32)]
    if high_level:
        loaded = jax.export.deserialize(jax.export.export(jax.jit(operator))(*shapes).serialize())
    else:
        loaded = exported(operator, *shapes)
    for B, T in ((2, 9), (1, 40)):
        *x, u, _ = inputs(B, T)
        y, state = loaded.call(*(a.reshape(B, T, 8) for a in x), u.reshape(8))
        assert state is None
        assert_close(y.reshape(x[0].shape), scanned(*x, u, jnp.zeros((B, 2, 4, 4)))[0])


def test_export_with_gradients():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in X]
    loaded = exported(wkv, *shapes, vjp_order=1)
    assert_close(jax.grad(loss(loaded.call), GRAD)(*X), jax.grad(loss(scanned), GRAD)(*X))


def test_lowered_for_nvidia_gpus():
    """What XLA is asked to do there; no GPU is needed to ask, and nothing of it runs."""
    allow = jax.export.DisabledSafetyCheck.custom_call
    names = ("rwkv6_xla_forward", "rwkv6_xla_backward")
    f = jax.jit(jax.value_and_grad(loss(partial(wkv, state_map=jnp.asarray([1, 0]))), GRAD))
    written = jax.export.export(
        f, platforms=["cuda"], disabled_checks=[allow(name) for name in names]
    )(*X)
    for name in names:
        assert written.mlir_module().count(f"stablehlo.custom_call @{name}(") == 1


def test_handlers_for_nvidia_gpus_come_with_cuda_kernels():
    with_cuda = _library.built_with_cuda(_library.load())
    assert backend._native_backends == ({"cpu", "gpu"} if with_cuda else {"cpu"})


def test_where_nothing_can_be_raised_a_wrong_entry_of_state_map_starts_from_nan(monkeypatch):
    monkeypatch.setattr(backend, "_operator", lambda count, states: lambda *operands: operands)
    *_, state, state_map = backend._native.__wrapped__(*X, jnp.asarray([1, 2]))
    np.testing.assert_array_equal(state[0], X[5][1])
    assert jnp.isnan(state[1]).all()
    np.testing.assert_array_equal(state_map, [1, 2])


@ON_THE_CPU
def test_a_traced_state_map_out_of_range_is_a_runtime_error():
    f = jax.jit(lambda m: wkv(*X, state_map=m))
    assert_close(f(jnp.asarray([1, 0])), scanned(*X[:5], X[5][::-1]))
    for bad in ([0, 2], [-1, 0]):
        with pytest.raises(Exception, match=r"state_map: entry . is .*, expected 0 to 1"):
            jax.block_until_ready(f(jnp.asarray(bad)))


@pytest.mark.parametrize("high_level", [pytest.param(False, marks=ON_THE_CPU), True])
def test_an_entry_that_32_bits_would_make_valid(high_level):
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        f = jax.jit(lambda m: wkv(*X, state_map=m, high_level=high_level))
        good = jnp.asarray([1, 0], jnp.int64)
        assert_close(f(good), scanned(*X[:5], X[5][::-1]))
        for bad in (2**32 + 1, 2**32, -(2**32)):
            if high_level:
                y, state = f(jnp.asarray([1, bad], jnp.int64))
                assert jnp.isnan(y[1]).all()
                assert jnp.isnan(state[1]).all()
                assert jnp.isfinite(y[0]).all()
                continue
            with pytest.raises(Exception, match=r"state_map: entry 1 is .*, expected 0 to 1"):
                jax.block_until_ready(f(jnp.asarray([1, bad], jnp.int64)))


def test_x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        x = [jnp.asarray(a) for a in random_inputs(dtype="float64", states=2, extreme=False)]
        y, state = jax.jit(wkv)(*x)
        assert y.dtype == state.dtype == jnp.float64
        for a, b in zip((y, state), scanned(*x)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
