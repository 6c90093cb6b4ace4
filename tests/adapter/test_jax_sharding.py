"""The native kernels on a mesh of eight (virtual) devices: what is moved, and what comes out."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import recurrence
from backend import relative_rms
from jax.sharding import NamedSharding, PartitionSpec
from samples import flat, random_grads, random_inputs

import keras_adapter
from keras_adapter import RWKVKernelOperator
from keras_adapter.ops import wkv

pytestmark = [
    pytest.mark.skipif(not keras_adapter.has_kernels, reason="the XLA binding is not built"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices"),
]

SHARDY = jax.config.jax_use_shardy_partitioner
NEEDS_SHARDY = pytest.mark.skipif(not SHARDY, reason="without Shardy it gathers")
B, T, H, N = 8, 24, 4, 8
GRAD = range(6)
P = PartitionSpec
MESH = jax.make_mesh((4, 2), ("data", "model"))
if hasattr(jax.sharding, "AxisType"):
    MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
TOKENS = P("data", None, "model", None)
BY_BATCH_AND_HEAD = (*(TOKENS,) * 4, P("model"), P("data", "model"))
LAYOUTS = {
    "batch and heads": BY_BATCH_AND_HEAD,
    "batch": (P("data"),) * 4 + (P(), P("data")),
    "batch over both axes": (P(("data", "model")),) * 4 + (P(), P(("data", "model"))),
    "heads": (P(None, None, "model"),) * 4 + (P("model"), P(None, "model")),
    "tokens": (P(None, "data"),) * 4 + (P(), P()),
    "keys": (P("data", None, None, "model"),) * 4 + (P(None, "model"), P("data", None, "model")),
    "each otherwise": (P("data"), P(), P(None, None, "model"), P(None, "data"), P(), P("model")),
    "whole": (P(),) * 6,
}
# over how many devices a layout cuts batch and heads
DEVICES = {
    "batch and heads": (4, 2),
    "batch": (4, 1),
    "batch over both axes": (8, 1),
    "heads": (1, 2),
}
COLLECTIVES = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter")


def place(x, layout):
    return tuple(jax.device_put(a, NamedSharding(MESH, spec)) for a, spec in zip(x, layout))


def loss(y, state):
    return jnp.sin(y).sum() + (state**2).sum()


def gradients(f):
    return jax.grad(lambda *x: loss(*f(*x)), GRAD)


def compile_for(f, *x):
    return jax.jit(f).lower(*x).compile()


def collectives(program):
    """Those of a compiled program, and the shape of its first custom call's first result."""
    text = program.as_text()
    counts = {c: len(re.findall(rf"= [^=]*\b{c}(?:-start)?\(", text)) for c in COLLECTIVES}
    shape = re.search(r"\(f32\[([\d,]+)\][^=]*custom-call\([^\n]*rwkv6_xla", text)[1]
    return {name: n for name, n in counts.items() if n}, tuple(map(int, shape.split(",")))


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), rtol=1e-4, atol=1e-4)


X = tuple(jnp.asarray(x) for x in random_inputs(B, T, H, N, states=B, extreme=False))
EXPECTED, EXPECTED_GRADS = wkv(*X), gradients(wkv)(*X)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_results_of_one_device(layout):
    x = place(X, LAYOUTS[layout])
    forward, backward = compile_for(wkv, *x), compile_for(gradients(wkv), *x)
    outputs = forward(*x)
    assert_close(outputs, EXPECTED)
    assert_close(backward(*x), EXPECTED_GRADS)
    if layout not in DEVICES or not SHARDY:
        return
    # batch and heads stay where they are
    batches, heads = DEVICES[layout]
    moved, local = collectives(forward)
    assert moved == {}
    assert local == (B // batches, T, H // heads, N)
    for out in outputs:
        assert out.addressable_shards[0].data.shape[0] == B // batches
    # backward: no gather, and the gradient of u is all that devices add up
    moved, local = collectives(backward)
    assert moved == ({} if layout == "heads" else {"all-reduce": 1})
    assert local[0] == B // batches


@NEEDS_SHARDY
def test_donated_state_on_a_mesh():
    x = place(X, LAYOUTS["batch and heads"])
    addresses = [s.data.unsafe_buffer_pointer() for s in x[5].addressable_shards]
    y, state = jax.jit(lambda *x: wkv(*x), donate_argnums=5)(*x)
    assert [s.data.unsafe_buffer_pointer() for s in state.addressable_shards] == addresses
    assert_close((y, state), EXPECTED)


@NEEDS_SHARDY
def test_shared_states_and_state_map_on_a_mesh():
    index = np.array([2, 0, 1, 1, 2, 2, 0, 0], np.int32)
    x = place((*X[:5], X[5][:3]), (*BY_BATCH_AND_HEAD[:5], P(None, "model")))
    state_map = jax.device_put(index, NamedSharding(MESH, P("data")))

    def f(state_map, *x):
        return wkv(*x, state_map=state_map)

    plain = (*X[:5], X[5][:3])
    forward = compile_for(f, state_map, *x)
    assert_close(forward(state_map, *x), f(jnp.asarray(index), *plain))
    assert_close(
        jax.jit(gradients(partial(f, state_map)))(*x),
        gradients(partial(f, jnp.asarray(index)))(*plain),
    )
    moved, local = collectives(forward)
    assert local == (B // 4, T, H // 2, N)
    assert "all-gather" not in moved


def test_vmap_on_a_mesh():
    x = tuple(jnp.stack([a, 0.5 * a]) for a in X)
    sharded = tuple(
        jax.device_put(a, NamedSharding(MESH, P(None, *spec)))
        for a, spec in zip(x, BY_BATCH_AND_HEAD)
    )
    assert_close(jax.jit(jax.vmap(wkv))(*sharded), jax.vmap(wkv)(*x))


def shard_mapped(check):
    outputs = (TOKENS, P("data", "model"))
    options = {"mesh": MESH, "in_specs": BY_BATCH_AND_HEAD, "out_specs": outputs}
    if hasattr(jax, "shard_map"):
        return jax.shard_map(wkv, **options, check_vma=check)
    from jax.experimental.shard_map import shard_map

    return shard_map(wkv, **options, check_rep=check)


@pytest.mark.parametrize("check", [True, False])
def test_shard_map(check):
    if check and not hasattr(jax, "shard_map"):
        pytest.skip("this jax has no replication rule for custom calls: check_rep=False is needed")
    x = place(X, BY_BATCH_AND_HEAD)
    f = shard_mapped(check)
    forward = compile_for(f, *x)
    assert_close(forward(*x), EXPECTED)
    assert_close(jax.jit(gradients(f))(*x), EXPECTED_GRADS)
    moved, local = collectives(forward)
    assert moved == {}
    assert local == (B // 4, T, H // 2, N)


# ---- sequences in pieces, over the axis "data"

IN_PIECES = (*(P(None, "data", "model"),) * 4, P("model"), P(None, "model"))
OF_PIECES = (P(None, "data", "model"), P(None, "model"))


def pieces(f, check=False):
    """f over pieces of all sequences, and some of the heads."""
    options = {"mesh": MESH, "in_specs": IN_PIECES, "out_specs": OF_PIECES}
    if hasattr(jax, "shard_map"):
        return jax.shard_map(f, **options, check_vma=check)
    from jax.experimental.shard_map import shard_map

    return shard_map(f, **options, check_rep=check)


def sizes_sent(program):
    """How many numbers come out of each gather, and whether all other collectives are sums."""
    kinds = "|".join(COLLECTIVES)
    found = re.findall(rf"= ([^=]*)\b({kinds})(?:-start)?\(", program.as_text())
    gathered = [shape for shape, kind in found if kind == "all-gather"]
    sizes = [
        np.prod([int(n) for n in re.search(r"\[([\d,]+)\]", x)[1].split(",")]) for x in gathered
    ]
    return sorted(sizes), {kind for _, kind in found} == {"all-gather", "all-reduce"}


@pytest.mark.parametrize(
    ("high_level", "check", "state_map"),
    [(False, True, None), (False, False, (1, 0)), (True, True, None)],
)
def test_pieces_are_one_sequence(high_level, check, state_map):
    """Of any decays; gathered are a state, a decay and a state's gradient of each device."""
    if check and not hasattr(jax, "shard_map"):
        pytest.skip("this jax has no replication rule for custom calls: check_rep=False is needed")
    x = random_inputs(2, T, H, N, states=2)
    grads = random_grads(2, T, H, N)
    index = None if state_map is None else jnp.asarray(state_map)

    def of_a_piece(*x):
        return wkv(*x, axis_name="data", state_map=index, high_level=high_level)

    @jax.jit
    def run(x, grads):
        outputs, vjp = jax.vjp(pieces(of_a_piece, check), *x)
        return outputs, vjp(tuple(grads))

    program = run.lower(x, grads).compile()
    outputs, found = program(x, grads)
    expected = recurrence.wkv(*x, state_map=state_map)
    expected_grads = recurrence.gradients(*grads, *x, state_map=state_map)
    for a, b in zip((*outputs, *found), (*expected, *expected_grads), strict=True):
        assert relative_rms(a, b) < 1e-6
    devices, state = 4, 2 * (H // 2) * N * N
    sizes, sums = sizes_sent(program)
    assert sizes == [devices * state // N, devices * state, devices * state]
    assert sums


def test_pieces_in_a_keras_graph():
    tokens, state = keras.KerasTensor((None, T, H, N)), keras.KerasTensor((None, H, N, N))
    y, _ = wkv(*(tokens,) * 4, keras.KerasTensor((H, N)), state, axis_name="data")
    node = y._keras_history.operation
    again = type(node).from_config(node.get_config())
    x = random_inputs(2, T, H, N, states=2)
    assert_close(jax.jit(pieces(again))(*x), recurrence.wkv(*x))


EXPLICIT = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="no explicit sharding yet")


def explicit_mesh():
    types = (jax.sharding.AxisType.Explicit,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=types)


@EXPLICIT
def test_explicit_sharding_through_auto_axes():
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        x = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(X, BY_BATCH_AND_HEAD)]
        out = (P("data", None, "model", None), P("data", "model", None, None))
        found = jax.jit(jax.sharding.auto_axes(wkv, out_sharding=out))(*x)
        assert_close(found, EXPECTED)


@EXPLICIT
@pytest.mark.parametrize("high_level", [False, True])
@pytest.mark.parametrize("layout", ["batch and heads", "tokens", "keys", "each otherwise"])
def test_explicit_axes(layout, high_level):
    """Results and gradients, in and out of jit; each gradient is cut as its input is."""
    mesh, f = explicit_mesh(), partial(wkv, high_level=high_level)
    with jax.set_mesh(mesh):
        x = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(X, LAYOUTS[layout])]
        outputs, grads = jax.jit(f)(*x), jax.jit(gradients(f))(*x)
        if not high_level:
            assert_close(f(*x), EXPECTED)
    assert_close(outputs, EXPECTED)
    assert_close(grads, EXPECTED_GRADS)
    if layout == "batch and heads":
        y, state = outputs
        assert jax.typeof(y).sharding.spec == P("data", None, "model", None)
        assert jax.typeof(state).sharding.spec == P("data", "model", None, None)
    for a, b in zip(grads, x):
        assert jax.typeof(a).sharding == jax.typeof(b).sharding


@EXPLICIT
def test_nothing_moves_on_explicit_axes():
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        x = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(X, BY_BATCH_AND_HEAD)]
        moved, local = collectives(compile_for(wkv, *x))
        assert moved == {}
        assert local == (B // 4, T, H // 2, N)
        moved, _ = collectives(compile_for(gradients(wkv), *x))
        assert moved == {"all-reduce": 1}


@EXPLICIT
def test_explicit_axes_of_the_operator_with_a_state_map():
    """Over (B, T, C), C cut by heads; and without a mesh that is set."""
    mesh, operator = explicit_mesh(), RWKVKernelOperator(N)
    tokens = [x.reshape(B, T, H * N) for x in X[:4]]
    index = jnp.asarray([2, 0, 1, 1, 2, 2, 0, 0])

    def f(state_map, *x):
        return operator(*x[:5], with_state=True, init_state=x[5], state_map=state_map)

    plain = (index, *tokens, X[4], X[5][:3])
    specs = (P("data"), *(P("data", None, "model"),) * 4, P("model"), P(None, "model"))
    x = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(plain, specs)]
    assert_close(jax.jit(f)(*x), f(*plain))
    with jax.set_mesh(mesh):
        assert_close(jax.jit(f)(*x), f(*plain))
        found = jax.jit(gradients(partial(f, x[0])))(*x[1:])
    assert_close(found, gradients(partial(f, index))(*plain[1:]))


# The program of rwkv6-keras-operator's page, but for the import of the operator, the devices and
# the sizes.
PROGRAM = """
import math
import jax
from jax.experimental.shard_map import shard_map
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import PartitionSpec as P
from keras_adapter import RWKVKernelOperator
from jax.sharding import Mesh, NamedSharding
from functools import partial
import jax.numpy as jnp
batch_size = 2
head_size = 8
num_heads = 2
seq_length = 5
hidden_size = head_size * num_heads
mesh = Mesh(jax.devices(), axis_names=('device_axis',))
num_devices = mesh.size
device_p = P('device_axis')
device_ns = NamedSharding(mesh, device_p)
@partial(shard_map, mesh=mesh, in_specs=(device_p, device_p, device_p, device_p, device_p), out_specs=(device_p, device_p), check_rep=False)
def call_kernel(r, k, v, w, u):
    if len(r.shape) == 4:
        r = jnp.squeeze(r, axis=0)
        k = jnp.squeeze(k, axis=0)
        v = jnp.squeeze(v, axis=0)
        w = jnp.squeeze(w, axis=0)
        u = jnp.squeeze(u, axis=0)
        y, ys = operator(r, k, v, w, u, with_state=True)
        y = jnp.expand_dims(y, axis=0)
        ys = jnp.expand_dims(ys, axis=0)
        return y, ys
    else:
        return operator(r, k, v, w, u, with_state=True)
operator = RWKVKernelOperator(head_size=head_size, max_sequence_length=seq_length)
inputs_r = jax.random.normal(jax.random.PRNGKey(0), LEADING + (seq_length, hidden_size))
inputs_r = jax.device_put(inputs_r, device_ns)
inputs_k = jax.random.normal(jax.random.PRNGKey(0), LEADING + (seq_length, hidden_size))
inputs_k = jax.device_put(inputs_k, device_ns)
inputs_v = jax.random.normal(jax.random.PRNGKey(0), LEADING + (seq_length, hidden_size))
inputs_v = jax.device_put(inputs_v, device_ns)
inputs_w = jax.random.normal(jax.random.PRNGKey(0), LEADING + (seq_length, hidden_size))
inputs_w = jax.device_put(inputs_w, device_ns)
inputs_u = jax.random.normal(jax.random.PRNGKey(0), (num_devices, hidden_size))
inputs_u = jax.device_put(inputs_u, device_ns)
JIT
outputs_y, y_state = call_kernel(inputs_r, inputs_k, inputs_v, inputs_w, inputs_u)
"""  # noqa: E501
JIT = """
call_kernel = jax.jit(call_kernel, in_shardings=(
                 device_ns, device_ns, device_ns, device_ns, device_ns),
                 out_shardings=(device_ns, device_ns))
"""
LEADING = {
    "devices as a dimension": "(num_devices, batch_size)",
    "devices in the batch": "(num_devices*batch_size,)",
}


@pytest.mark.filterwarnings("ignore:jax.experimental.shard_map is deprecated")
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("jit", [False, True])
def test_the_old_shard_map_program(leading, jit):
    pytest.importorskip("jax.experimental.shard_map")
    program = PROGRAM.replace("LEADING", LEADING[leading]).replace("JIT", JIT if jit else "")
    scope = {}
    exec(program, scope)
    devices, heads = scope["num_devices"], scope["num_heads"]
    width = scope["hidden_size"]
    tokens = [scope[f"inputs_{n}"].reshape(devices, 2, 5, heads, width // heads) for n in "rkvw"]
    for d in range(devices):
        u = np.asarray(scope["inputs_u"])[d].reshape(heads, -1)
        y, state = recurrence.wkv(*(np.asarray(x)[d] for x in tokens), u)
        found = np.asarray(scope["outputs_y"]).reshape(devices, *y.shape[:2], width)[d]
        np.testing.assert_allclose(found, flat(y), rtol=1e-4, atol=1e-4)
        found = np.asarray(scope["y_state"]).reshape(devices, *state.shape)[d]
        np.testing.assert_allclose(found, state, rtol=1e-4, atol=1e-4)
