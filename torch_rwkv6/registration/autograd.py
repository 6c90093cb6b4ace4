"""Derivatives: reverse mode runs the kernels, everything else runs plain PyTorch.

These are kernels for the Autograd key. torch.library.register_autograd would be shorter, but its
forward-mode derivatives are silently zero, it fails inside torch.func transforms, and a call costs
about twice as much.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from torch_rwkv6._library import has_cuda_kernels, has_kernels
from torch_rwkv6._torch_private import (
    after_inplace_or_view,
    below_autograd,
    forward_mode_active,
    transforms_active,
)
from torch_rwkv6.arguments import needs_grad
from torch_rwkv6.contract import DERIVATIVES, OPERATORS, Operator
from torch_rwkv6.registration import fallback
from torch_rwkv6.registration.schema import library


def _needs_pytorch(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch.func or forward-mode AD must see the operations of plain PyTorch."""
    if transforms_active():
        return True
    if not forward_mode_active():
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _starts_from_checkpoints(r: Tensor) -> bool:
    """Whether there is a kernel whose backward starts from checkpoints.

    On GPUs those are the chunked ones. What is made of other tensors, such as a DTensor, is left to
    the rules that it has for the public operators.
    """
    if hasattr(r, "__tensor_flatten__"):
        return False
    if r.device.type == "cuda":
        half = r.dtype in (torch.bfloat16, torch.float16)
        return has_cuda_kernels and half and r.shape[-1] in (32, 64, 128)
    return has_kernels and r.device.type == "cpu"


def _autograd_function(op: Any, public: Operator, backward: Any) -> Any:
    """The autograd function of `public`, computed by `op`.

    What `op` returns beyond the results of `public` is saved for `backward`, behind the inputs. The
    function's name is what grad_fn and anomaly mode show.
    """
    results = len(public.results)

    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        with below_autograd():
            found = op(*inputs)
        ctx.save_for_backward(*inputs, *found[results:])
        ctx.set_materialize_grads(False)
        return found[:results]

    name = f"rwkv6_{public.name}"
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return types.new_class(
        name, (torch.autograd.Function,), exec_body=lambda ns: ns.update(methods)
    )


def _functions(forward: Operator, backward_operator: Operator) -> tuple[Any, Any]:
    """The autograd functions of an operator and of its backward operator.

    `forward` may be the checkpointed form of the operator that `backward_operator` is of.
    """
    backward_op = backward_operator.overload
    pytorch_backward = fallback.KERNELS[backward_operator.name]
    differentiable = forward.differentiable
    count = len(forward.arguments)
    public = backward_operator.forward
    assert public is not None

    def backward(
        ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needed)
        if grad_y is not None or grad_final_state is not None:
            saved = ctx.saved_tensors
            found = backward_op(grad_y, grad_final_state, *saved[count:], *saved[:count])
            for i, g in zip(differentiable, found, strict=True):
                if needed[i]:
                    grads[i] = g
        return tuple(grads)

    def double_backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needed = [i for i, n in enumerate(ctx.needs_input_grad) if n]
        grads: list[Tensor | None] = [None] * len(saved)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # A separate alias of each input, so that autograd.grad does not also follow paths
            # from one input to another in the caller's graph.
            inputs = [x.view_as(x) if i in needed else x for i, x in enumerate(saved)]
            outputs = pytorch_backward(*inputs)
            # Some outputs depend on no input: the state's gradient without a state, most if T = 0.
            paths = [
                (out, g)
                for out, g in zip(outputs, grad_outputs)
                if g is not None and out.requires_grad
            ]
            if not paths:
                return tuple(grads)
            found = torch.autograd.grad(
                [out for out, _ in paths],
                [inputs[i] for i in needed],
                [g for _, g in paths],
                create_graph=create_graph,
                allow_unused=True,
            )
        for i, g in zip(needed, found, strict=True):
            grads[i] = g
        return tuple(grads)

    return (
        _autograd_function(forward.overload, public, backward),
        _autograd_function(backward_op, backward_operator, double_backward),
    )


def _differentiable(
    operator: Operator, function: Any, checkpointed: Any = None
) -> Callable[..., Any]:
    """The Autograd kernel; without an autograd function PyTorch's operations are recorded.

    On devices with kernels an operator's checkpointed form is run, if there is one.
    """
    op, in_python = operator.overload, fallback.KERNELS[operator.name]

    def kernel(*arguments: Any) -> Any:
        if _needs_pytorch(arguments):
            return in_python(*arguments)
        if needs_grad(*arguments):
            if function is None:
                return in_python(*arguments)
            if checkpointed and _starts_from_checkpoints(arguments[0]):
                return checkpointed.apply(*operator.complete(arguments))
            return function.apply(*operator.complete(arguments))
        with below_autograd():
            return op(*arguments)

    return kernel


def _bump_version(op: Any, state_index: int) -> Any:
    def kernel(keyset: Any, *args: Any) -> Tensor:
        below = keyset & after_inplace_or_view
        y = op.redispatch(below, *args)
        # Lets autograd notice that a tensor saved for a backward pass has been overwritten.
        torch.autograd.graph.increment_version(args[state_index])
        return y

    return kernel


def _resolve_negated(op: Any, state_index: int) -> Any:
    """`op` for arguments that are lazily negated views (``x.conj().imag``), which it resolves."""

    def kernel(*args: Any) -> Tensor:
        if args[state_index].is_neg():
            raise RuntimeError(
                "state: it is updated in place, but it is a view that negates other memory "
                "(x.conj().imag, for example): call .resolve_neg() on it first"
            )
        return op(*(x.resolve_neg() if isinstance(x, Tensor) else x for x in args))

    return kernel


def _without_derivatives(name: str, differentiable_name: str, update: Any) -> Any:
    """The Autograd kernel of an update operator, which refuses to be differentiated."""

    def kernel(keyset: Any, *args: Any) -> Tensor:
        if _needs_pytorch(args):
            raise RuntimeError(
                f"rwkv6::{name} overwrites its state and has no derivative: inside forward-mode "
                f"AD and torch.func transforms other than vmap use rwkv6::{differentiable_name}"
            )
        if needs_grad(*args):
            raise RuntimeError(
                f"rwkv6::{name} overwrites its state and has no derivative: call it under "
                f"torch.no_grad() or torch.inference_mode(), or use rwkv6::{differentiable_name}"
            )
        # Redispatched, because a new call of the operator would double the overhead.
        return update(keyset, *args)

    return kernel


_functions_of: dict[str, Any] = {}
_checkpointed_functions_of: dict[str, Any] = {}
for _forward, _backward in DERIVATIVES:
    _function, _functions_of[_backward.name] = _functions(_forward, _backward)
    if _forward.checkpointed_of is None:
        _functions_of[_forward.name] = _function
    else:
        _checkpointed_functions_of[_forward.checkpointed_of.name] = _function
for _operator in OPERATORS:
    _name, _op = _operator.name, _operator.overload
    if _operator.checkpointed_of is not None:
        continue
    if _operator.update_of is None:
        _function, _checkpointed = _functions_of.get(_name), _checkpointed_functions_of.get(_name)
        _kernel = _differentiable(_operator, _function, _checkpointed)
        library.impl(_name, _kernel, "Autograd")
        continue
    (_state,) = _operator.mutated
    _update = _bump_version(_op, _state)
    _kernel = _without_derivatives(_name, _operator.update_of.name, _update)
    library.impl(_name, _kernel, "Autograd", with_keyset=True)
    # where the Autograd key is switched off, as in inference mode
    library.impl(_name, _update, "ADInplaceOrView", with_keyset=True)
    library.impl(_name, _resolve_negated(_op, _state), "Negative")
