"""Whatever is done to a module acts in decoding as it does in forward.

Hooks, replaced forwards and modules, quantised, low-rank and parametrised weights, compiled blocks:
`forward_` and `generate` give what `forward` gives.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from checkpoints import random_model, random_tokens
from torch import Tensor, nn

import torch_rwkv6
from torch_rwkv6.nn import RWKV, RWKVState

VERSIONS = ("4", "5.2", "6")
Change = Callable[[RWKV], Any]


def mixed(x: Tensor) -> Tensor:
    """Something that no norm and no single scale takes back."""
    return x + 0.5 * x.roll(1, -1)


def first_mixed(results: Any) -> Any:
    return (mixed(results[0]), *results[1:]) if isinstance(results, tuple) else mixed(results)


def forward_hook(model: RWKV, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda m, args, out: first_mixed(out))


def forward_hook_always_called(model: RWKV, name: str) -> None:
    model.get_submodule(name).register_forward_hook(
        lambda m, args, kwargs, out: first_mixed(out), with_kwargs=True, always_call=True
    )


def pre_hook(model: RWKV, name: str) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (mixed(x) if x.is_floating_point() else x.flip(0), *args[1:])

    model.get_submodule(name).register_forward_pre_hook(hook)


def pre_hook_with_kwargs(model: RWKV, name: str) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0]
        return (mixed(x) if x.is_floating_point() else x.flip(0), *args[1:]), kwargs

    model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)


def replaced_forward(model: RWKV, name: str) -> None:
    module = model.get_submodule(name)
    plain = module.forward
    module.forward = lambda *a, **k: first_mixed(plain(*a, **k))


def replaced_forward_of_the_documented_arguments(model: RWKV, name: str) -> None:
    module = model.get_submodule(name)
    plain = module.forward

    def forward(x: Tensor, *states: Any) -> Any:
        return first_mixed(plain(x, *states))

    module.forward = forward


def subclass(model: RWKV, name: str) -> None:
    module = model.get_submodule(name)

    class Mixed(type(module)):  # type: ignore[misc]
        def forward(self, x: Tensor, *states: Any) -> Any:
            return first_mixed(super().forward(x, *states))

    module.__class__ = Mixed


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return first_mixed(self.inner(*args))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def wrapper(model: RWKV, name: str) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Wrapper(model.get_submodule(name)))


def class_forward(model: RWKV, name: str) -> None:
    """A subclass made by hand gets its forward patched afterwards."""
    module = model.get_submodule(name)
    module.__class__ = type("Patched", (type(module),), {})
    plain = type(module).forward
    type(module).forward = lambda self, *a, **k: first_mixed(plain(self, *a, **k))


OF_ALL = ("", "blocks.1", "blocks.1.att", "blocks.1.att.key")
OF_RWKV_6 = ("blocks.1.ffn", "blocks.1.ln2", "blocks.0.ln0", "blocks.1.att.ln_x")
OF_RWKV_6 += ("blocks.1.ffn.value", "ln_out", "head", "emb")


def assert_decoding_is_forward(
    model: RWKV, tolerance: dict[str, float] | None = None
) -> tuple[Tensor, RWKVState]:
    """The logits of forward_ and of forward, and the states they leave, token by token."""
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-4}
    tokens = random_tokens(2, 4)
    with torch.no_grad():
        state, own = model.initial_state(2), model.initial_state(2)
        for piece in tokens.split([2, 1, 1], 1):
            memory = [x.data_ptr() for x in own]
            logits, state = model(piece, state)
            found = model.forward_(piece, own)
            torch.testing.assert_close(found, logits[:, -1], **tolerance)
            for x, y in zip(own, state, strict=True):
                torch.testing.assert_close(x, y, **tolerance)
            assert memory == [x.data_ptr() for x in own]
        generated = [t.tolist() for t in torch_rwkv6.generate(model, tokens, 3, temperature=0.0)]
        expected, state = [], None
        piece = tokens
        for _ in range(3):
            logits, state = model(piece, state)
            piece = logits[:, -1:].argmax(-1)
            expected.append(piece[:, 0].tolist())
    assert generated == expected
    return found, own


@functools.cache
def of_the_unchanged_model(version: str) -> Tensor:
    return assert_decoding_is_forward(random_model(version))[0]


@pytest.mark.parametrize(
    "change",
    [
        *(forward_hook, forward_hook_always_called, pre_hook, pre_hook_with_kwargs),
        *(replaced_forward, replaced_forward_of_the_documented_arguments, subclass, wrapper),
        class_forward,
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_changed_module_acts_in_decoding(
    version: str, change: Callable[[RWKV, str], None]
) -> None:
    for name in OF_ALL + (OF_RWKV_6 if version == "6" else ()):
        if change is wrapper and name in ("", "blocks.1"):
            continue  # what is left is no RWKV; a list of blocks has no attributes to set
        model = random_model(version)
        change(model, name)
        changed, _ = assert_decoding_is_forward(model)
        assert not torch.allclose(changed, of_the_unchanged_model(version), atol=1e-3), name


def test_every_hook_is_called_once_a_token() -> None:
    model, calls = random_model("6"), dict[str, int]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            calls[name] = 0

            def count(*_: Any, name: str = name) -> None:
                calls[name] += 1

            module.register_forward_hook(count)
    state = model.initial_state(1)
    for _ in range(3):
        model.forward_(torch.tensor([[1]]), state)
    assert set(calls.values()) == {3}


def test_global_hooks_see_every_module() -> None:
    model, seen = random_model("6"), list[str]()
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda module, *_: seen.append(type(module).__name__))
        try:
            seen.clear()
            model.forward_(torch.tensor([[1]]), model.initial_state(1))
            assert seen.count("TimeMix") == model.n_layer
            assert seen.count("Linear") == 8 * model.n_layer + 1
        finally:
            handle.remove()


def test_features_pass_the_same_door() -> None:
    model, calls = random_model("6"), list[int]()
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    model.features(random_tokens(1, 2))
    assert calls == [1]


# ---- weights that are not plain tensors


class Int8Weight(Tensor):
    """A weight kept in int8 and multiplied as such, as torchao does it: nothing else is defined."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Int8Weight:
        self = Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)
        self.values, self.scale = values, scale
        return self

    def __init__(self, values: Tensor, scale: Tensor) -> None: ...

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is nn.functional.linear:
            x, weight = args[:2]
            return (x @ weight.values.to(x.dtype).T) * weight.scale.T
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{function} on an int8 weight")


def with_int8_weights(model: RWKV) -> RWKV:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(Int8Weight.of(module.weight.detach()), requires_grad=False)
    return model


def dynamically_quantised(model: RWKV) -> RWKV:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.parametrize("version", VERSIONS)
def test_weights_of_a_tensor_subclass(version: str) -> None:
    model = with_int8_weights(random_model(version))
    found, _ = assert_decoding_is_forward(model)
    plain, _ = assert_decoding_is_forward(random_model(version))
    error = (found - plain).norm() / plain.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("version", VERSIONS)
def test_dynamic_quantisation_takes_every_linear_layer(version: str) -> None:
    model = random_model(version).eval()
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert len(linears) == {"4": 7, "5.2": 8, "6": 8}[version] * model.n_layer + 1
    quantised = dynamically_quantised(model)
    for name in linears:
        assert type(quantised.get_submodule(name)) is torch.ao.nn.quantized.dynamic.Linear, name
    # its rows share one scale, so a token alone is rounded otherwise than among others
    found, _ = assert_decoding_is_forward(quantised, {"rtol": 0.2, "atol": 0.2})
    plain, _ = assert_decoding_is_forward(model)
    assert (found - plain).norm() / plain.norm() < 0.1


def test_one_weight_that_is_not_plain_is_enough() -> None:
    for name in ("att.time_decay", "att.time_maa_w2", "ln1.weight", "att.ln_x.bias"):
        model = random_model("6")
        owner, _, last = name.rpartition(".")
        module = model.blocks[1].get_submodule(owner)
        seen = list[str]()

        class Watched(Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None, seen=seen):
                seen.append(function.__name__)
                return super().__torch_function__(function, types, args, kwargs)

        weight = getattr(module, last).detach()
        delattr(module, last)
        module.register_parameter(last, nn.Parameter(weight.as_subclass(Watched)))
        expected, _ = random_model("6")(torch.tensor([[5]]))
        seen.clear()
        found = model.forward_(torch.tensor([[5]]), model.initial_state(1))
        torch.testing.assert_close(found.as_subclass(Tensor), expected[:, 0])
        assert set(seen) - {"dtype", "__get__"}, name


def parametrised(model: RWKV) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(model.blocks[1].att.key, "weight", Double())
    nn.utils.parametrize.register_parametrization(model.blocks[0].att, "time_faaaa", Double())


def weight_normed(model: RWKV) -> None:
    layer = nn.utils.parametrizations.weight_norm(model.blocks[1].att.key)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


def pruned(model: RWKV) -> None:
    torch.nn.utils.prune.l1_unstructured(model.blocks[1].ffn.key, "weight", amount=0.5)


def spectral_normed(model: RWKV) -> None:
    nn.utils.spectral_norm(model.blocks[1].ffn.key)


def with_a_bias(model: RWKV) -> None:
    model.blocks[1].att.output.bias = nn.Parameter(torch.randn(model.n_embd))


def with_fewer_groups(model: RWKV) -> None:
    old = model.blocks[1].att.ln_x
    new = nn.GroupNorm(1, model.n_embd, eps=old.eps)
    new.load_state_dict(old.state_dict())
    model.blocks[1].att.ln_x = new


def without_affine_norm(model: RWKV) -> None:
    model.blocks[1].ln1 = nn.LayerNorm(model.n_embd, elementwise_affine=False)


def sparse(model: RWKV) -> None:
    weight = model.blocks[1].ffn.key.weight.detach()
    weight = torch.where(weight.abs() < 0.1, 0, weight)
    model.blocks[1].ffn.key.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)


def transposed(model: RWKV) -> None:
    weight = model.blocks[1].ffn.key.weight.detach()
    model.blocks[1].ffn.key.weight = nn.Parameter(-weight.T.contiguous().T)


def plain_attributes(model: RWKV) -> None:
    """Weights that are no parameters, as some quantisers and hypernetworks leave them."""
    for name in ("blocks.1.ffn.key", "head"):
        layer = model.get_submodule(name)
        weight = 2 * layer.weight.detach()
        del layer.weight
        layer.weight = weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        *(parametrised, weight_normed, pruned, spectral_normed, with_a_bias, with_fewer_groups),
        *(without_affine_norm, sparse, transposed, plain_attributes),
    ],
)
def test_weights_that_are_made_otherwise(change: Change) -> None:
    model = random_model("6")
    unchanged, _ = assert_decoding_is_forward(model)
    change(model)
    found, _ = assert_decoding_is_forward(model)
    assert not torch.allclose(found, unchanged, atol=1e-3)


def test_lora_acts_in_decoding_and_merges() -> None:
    peft = pytest.importorskip("peft")
    layers = ["receptance", "key", "value", "gate", "output"]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(random_model("6"), config).eval()
    model = tuned.base_model.model
    unchanged, _ = assert_decoding_is_forward(random_model("6"))
    found, _ = assert_decoding_is_forward(model)
    assert not torch.allclose(found, unchanged, atol=1e-3)
    merged, _ = assert_decoding_is_forward(tuned.merge_and_unload())
    torch.testing.assert_close(merged, found, rtol=1e-4, atol=1e-4)


def test_hooks_on_quantised_models() -> None:
    for model in (with_int8_weights(random_model("6")), dynamically_quantised(random_model("6"))):
        tolerance = {"rtol": 0.2, "atol": 0.2}
        unchanged, _ = assert_decoding_is_forward(model, tolerance)
        forward_hook(model, "blocks.1.att")
        found, _ = assert_decoding_is_forward(model, tolerance)
        assert not torch.allclose(found, unchanged, atol=1e-2)


@pytest.mark.parametrize("version", VERSIONS)
def test_functional_call_and_deepcopy(version: str) -> None:
    model = random_model(version)
    weights = {n: 0.5 * p.detach() for n, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    token, options = torch.tensor([[3]]), {"update": True}
    with torch.no_grad():
        expected = other.forward_(token, other.initial_state(1))
        arguments = (token, model.initial_state(1))
        found, _ = torch.func.functional_call(model, weights, arguments, options)
    torch.testing.assert_close(found[:, -1], expected)


# ---- what watches or transforms operations


def test_modes_see_the_modules_operations() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, token = random_model("6"), torch.tensor([[3]])
    with torch.no_grad():
        with FlopCounterMode(display=False) as one:
            model.forward_(token, model.initial_state(1))
        with FlopCounterMode(display=False) as many:
            model.forward_(token.expand(16, 1), model.initial_state(16))
    assert one.get_total_flops() * 16 == many.get_total_flops() > 0


def test_autocast_decodes_as_forward_does() -> None:
    for version in VERSIONS:
        with torch.autocast("cpu", torch.bfloat16):
            _, state = assert_decoding_is_forward(
                random_model(version), {"rtol": 0.05, "atol": 0.05}
            )
        assert state.wkv.dtype == torch.float32
        assert not torch.equal(state.wkv, state.wkv.bfloat16().float())


def test_inference_mode_and_its_states() -> None:
    model, tokens = random_model("6"), random_tokens(2, 3)
    expected, _ = model(tokens)
    with torch.inference_mode():
        state = model.initial_state(2)
        for token in tokens.split(1, 1):
            found = model.forward_(token, state)
    torch.testing.assert_close(found, expected[:, -1].detach())
    state = model.initial_state(2)
    with torch.inference_mode():
        for token in tokens.split(1, 1):
            found = model.forward_(token, state)
    torch.testing.assert_close(found, expected[:, -1].detach())


@pytest.mark.filterwarnings("ignore")
def test_a_jit_trace_serves_other_sizes() -> None:
    model = random_model("6")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens)[0]

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), random_tokens(2, 3), check_trace=False)
    assert "matvec" not in str(traced.inlined_graph)
    for shape in ((2, 3), (3, 5), (1, 1)):
        tokens = random_tokens(*shape)
        torch.testing.assert_close(traced(tokens), model(tokens)[0])


def test_compiled_blocks_act_in_decoding() -> None:
    torch._dynamo.reset()
    for version in VERSIONS:
        model = random_model(version)
        for block in model.blocks:
            block.compile(backend="eager")
        assert_decoding_is_forward(model)
    model = random_model("6")
    model.blocks[1].att.key.compile(backend="eager")
    assert_decoding_is_forward(model)
