"""Derivatives. Reverse mode runs the kernels; what they cannot do goes through the reference.

A kernel on the Autograd key of our own, instead of torch.library.register_autograd, because that
one gives silently zero forward-mode derivatives, fails inside torch.func transforms and costs
about twice as much a call.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from torch_rwkv6 import reference, reference4
from torch_rwkv6._torch_private import (
    after_inplace_or_view,
    below_autograd,
    forward_mode_active,
    transforms_active,
)
from torch_rwkv6.registration import fallback
from torch_rwkv6.registration.schema import library

_wkv = torch.ops.rwkv6.wkv.default
_wkv_backward = torch.ops.rwkv6.wkv_backward.default
_wkv_update = torch.ops.rwkv6.wkv_update.default
_wkv4 = torch.ops.rwkv6.wkv4.default
_wkv4_backward = torch.ops.rwkv6.wkv4_backward.default
_wkv4_update = torch.ops.rwkv6.wkv4_update.default
_matvec = torch.ops.rwkv6.matvec.default


def _needs_reference(tensors: tuple[Tensor | None, ...]) -> bool:
    """Under torch.func transforms and forward-mode AD the reference's own operations are traced."""
    if transforms_active():
        return True
    if not forward_mode_active():
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _needs_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _autograd_function(op: Any, backward: Any) -> Any:
    """The autograd function of `op`, under its name: grad_fn and anomaly mode show it."""

    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        with below_autograd():
            return op(*inputs)

    name = op._schema.name.replace("::", "_")  # rwkv6_wkv
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return types.new_class(
        name, (torch.autograd.Function,), exec_body=lambda ns: ns.update(methods)
    )


def _functions(op: Any, backward_op: Any, reference_backward: Any) -> tuple[Any, Any]:
    """The autograd functions of an operator and of its backward operator.

    The operator's first inputs are those that backward_op returns gradients of, in this order.
    """

    def backward(
        ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if grad_y is None and grad_final_state is None:
            return (None,) * len(needed)
        grads = backward_op(grad_y, grad_final_state, *ctx.saved_tensors)
        no_index = (None,) * (len(needed) - len(grads))  # state_map and cu_seqlens
        return *(g if n else None for g, n in zip(grads, needed)), *no_index

    def double_backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        needed = [i for i, n in enumerate(ctx.needs_input_grad) if n]
        grads: list[Tensor | None] = [None] * len(saved)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # An alias of each input of its own, so that a path from one input to another in
            # the caller's graph is not walked here as well.
            inputs = [x.view_as(x) if i in needed else x for i, x in enumerate(saved)]
            outputs = reference_backward(*inputs)
            # some depend on nothing: the last without initial_state, most without any token
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

    return _autograd_function(op, backward), _autograd_function(backward_op, double_backward)


_WKV, _WKVBackward = _functions(_wkv, _wkv_backward, reference.wkv_backward)
_WKV4, _WKV4Backward = _functions(_wkv4, _wkv4_backward, reference4.wkv4_backward)


def _bump_version(op: Any, state_index: int) -> Any:
    def kernel(keyset: Any, *args: Any) -> Tensor:
        below = keyset & after_inplace_or_view
        y = op.redispatch(below, *args)
        # lets autograd notice that a tensor saved for a backward pass was overwritten since
        torch.autograd.graph.increment_version(args[state_index])
        return y

    return kernel


_update_wkv = _bump_version(_wkv_update, 5)
_update_wkv4 = _bump_version(_wkv4_update, 4)


def _resolve_negated(op: Any, state_index: int) -> Any:
    """`op` where an argument is a view that negates (``x.conj().imag``): inputs are computed."""

    def kernel(*args: Any) -> Tensor:
        if args[state_index].is_neg():
            raise RuntimeError(
                "state: it is updated in place, but it is a view that negates other memory "
                "(x.conj().imag, for example): call .resolve_neg() on it first"
            )
        return op(*(x.resolve_neg() if isinstance(x, Tensor) else x for x in args))

    return kernel


def _refuse_derivatives(inputs: tuple[Tensor | None, ...], name: str) -> None:
    if _needs_reference(inputs):
        raise RuntimeError(
            f"rwkv6::{name}_update overwrites its state and has no derivative: inside forward-mode "
            f"AD and torch.func transforms other than vmap use rwkv6::{name}"
        )
    if _needs_grad(inputs):
        raise RuntimeError(
            f"rwkv6::{name}_update overwrites its state and has no derivative: call it under "
            f"torch.no_grad() or torch.inference_mode(), or use rwkv6::{name}"
        )


def wkv(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None = None,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> tuple[Tensor, Tensor]:  # y [B, T, H, N], final_state [B or M, H, N, N]
    inputs = (r, k, v, w, u, initial_state)
    if _needs_reference(inputs):
        return fallback.wkv(*inputs, state_map, cu_seqlens)
    if _needs_grad(inputs):
        return _WKV.apply(*inputs, state_map, cu_seqlens)
    with below_autograd():
        return _wkv(*inputs, state_map, cu_seqlens)


def wkv_backward(
    grad_y: Tensor | None,  # [B, T, H, N]
    grad_final_state: Tensor | None,  # [B or M, H, N, N]
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    initial_state: Tensor | None,  # [S, H, N, N]
    state_map: Tensor | None,  # [B] or [M]
    cu_seqlens: Tensor | None,  # [M + 1]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (grad_y, grad_final_state, r, k, v, w, u, initial_state)
    if _needs_reference(inputs):
        return fallback.wkv_backward(*inputs, state_map, cu_seqlens)
    if _needs_grad(inputs):
        return _WKVBackward.apply(*inputs, state_map, cu_seqlens)
    with below_autograd():
        return _wkv_backward(*inputs, state_map, cu_seqlens)


def wkv_update(
    keyset: Any,
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    w: Tensor,  # [B, T, H, N]
    u: Tensor,  # [H, N]
    state: Tensor,  # [S, H, N, N]
    state_map: Tensor | None = None,  # [B] or [M]
    cu_seqlens: Tensor | None = None,  # [M + 1]
) -> Tensor:  # [B, T, H, N]
    inputs = (r, k, v, w, u, state)
    _refuse_derivatives(inputs, "wkv")
    # not from the dispatcher's start again, which would take as long as all the rest
    return _update_wkv(keyset, *inputs, state_map, cu_seqlens)


def wkv4(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None = None,  # [B, 3, D]
) -> tuple[Tensor, Tensor]:  # y [B, T, D], final_state [B, 3, D]
    inputs = (k, v, w, u, initial_state)
    if _needs_reference(inputs):
        return fallback.wkv4(*inputs)
    if _needs_grad(inputs):
        return _WKV4.apply(*inputs)
    with below_autograd():
        return _wkv4(*inputs)


def wkv4_backward(
    grad_y: Tensor | None,  # [B, T, D]
    grad_final_state: Tensor | None,  # [B, 3, D]
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    initial_state: Tensor | None,  # [B, 3, D]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (grad_y, grad_final_state, k, v, w, u, initial_state)
    if _needs_reference(inputs):
        return fallback.wkv4_backward(*inputs)
    if _needs_grad(inputs):
        return _WKV4Backward.apply(*inputs)
    with below_autograd():
        return _wkv4_backward(*inputs)


def wkv4_update(
    keyset: Any,
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    w: Tensor,  # [D]
    u: Tensor,  # [D]
    state: Tensor,  # [B, 3, D]
) -> Tensor:  # [B, T, D]
    inputs = (k, v, w, u, state)
    _refuse_derivatives(inputs, "wkv4")
    return _update_wkv4(keyset, *inputs)


def matvec(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
) -> Tensor:  # [M, N]
    inputs = (x, weight)
    if _needs_reference(inputs) or _needs_grad(inputs):
        return fallback.matvec(*inputs)
    with below_autograd():
        return _matvec(*inputs)


for _function in (wkv, wkv_backward, wkv4, wkv4_backward, matvec):
    library.impl(_function.__name__, _function, "Autograd")
for _in_place, _update, _negated in (
    (wkv_update, _update_wkv, _resolve_negated(_wkv_update, 5)),
    (wkv4_update, _update_wkv4, _resolve_negated(_wkv4_update, 4)),
):
    library.impl(_in_place.__name__, _in_place, "Autograd", with_keyset=True)
    # where the Autograd key is switched off, as in inference mode
    library.impl(_in_place.__name__, _update, "ADInplaceOrView", with_keyset=True)
    library.impl(_in_place.__name__, _negated, "Negative")
