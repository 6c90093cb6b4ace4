"""Plain PyTorch as the kernel of every device that has no native one: WKV6 by chunks.

It is registered for all backends; kernels of the binary take precedence where they are loaded.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torch_rwkv6 import chunked, reference4
from torch_rwkv6._library import cuda_problem, has_cuda_kernels, has_kernels
from torch_rwkv6.checks import check, check_memory, check_values
from torch_rwkv6.contract import OPERATORS, Operator, state_dtype
from torch_rwkv6.registration.schema import library


def _kernel(operator: Operator, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the operator's checks before it."""

    def kernel(*arguments: Any) -> Any:
        sizes = check(operator, arguments)
        given = operator.named(arguments)
        if "cu_seqlens" in given:
            check_values(
                sizes["T"],
                sizes.get("S", 1),
                given["state_map"],
                given["cu_seqlens"],
                negative_skips=bool(operator.mutated),
            )
        return function(*arguments)

    return kernel


def _in_place(operator: Operator, forward: Callable[..., Any]) -> Callable[..., Tensor]:
    """An update operator: runs `forward` from the state and writes the final state back to it."""

    def update(*arguments: Any) -> Tensor:
        given = operator.named(arguments)
        state, state_map = given["state"], given.get("state_map")
        check_memory(state)
        if state_map is None:
            y, final_state = forward(*arguments)
            state.copy_(final_state)
            return y
        skipped = state_map < 0
        y, final_state = forward(*(given | {"state_map": state_map.clamp(min=0)}).values())
        # On a device where the values were not checked, an entry out of range has given NaN as y;
        # there is no row to write it to.
        written = ~skipped & (state_map < state.shape[0])
        state[state_map[written]] = final_state[written]
        cu_seqlens = given["cu_seqlens"]
        if cu_seqlens is None:
            return y.masked_fill(skipped[:, None, None, None], 0)
        padding = skipped.repeat_interleave(cu_seqlens.diff())  # [T]
        return y.masked_fill(padding[None, :, None, None], 0)

    return update


def _matvec(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
) -> Tensor:  # [M, N]
    return x @ weight.T


def _matvec_int8(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K], int8
    scale: Tensor,  # [N]
) -> Tensor:  # [M, N]
    y = x.to(state_dtype(x)) @ weight.to(state_dtype(x)).T
    return (y * scale).to(x.dtype)


def slow_on_gpus(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which warns once that kernels would be faster."""

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        _say_what_is_missing()
        return function(*args)

    return kernel


@functools.cache
def _say_what_is_missing() -> None:
    problem = cuda_problem() if has_kernels else None
    warnings.warn(
        "torch_rwkv6: there are no CUDA kernels, so WKV6 runs in plain PyTorch on the "
        f"GPU: the same results, but much slower.{f' Reason: {problem}.' if problem else ''} "
        "To build them for an NVIDIA GPU, "
        "install again where nvcc is found, with RWKV6_CUDA=1: pip install --force-reinstall "
        "--no-deps --no-binary torch_rwkv6 torch_rwkv6, or `pip install .` in a checkout.",
        RuntimeWarning,
        stacklevel=3,
    )


def _without_checkpoints(grad_y: Any, grad_final_state: Any, _: Any, *inputs: Any) -> Any:
    return chunked.wkv_backward(grad_y, grad_final_state, *inputs)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "wkv": chunked.wkv,
    "wkv_backward": chunked.wkv_backward,
    "wkv_final_state": chunked.wkv_final_state,
    "wkv_checkpointed_backward": _without_checkpoints,
    "wkv4": reference4.wkv4,
    "wkv4_backward": reference4.wkv4_backward,
    "matvec": _matvec,
    "matvec_int8": _matvec_int8,
}


def _function(operator: Operator) -> Callable[..., Any]:
    if operator.update_of is None:
        return _FUNCTIONS[operator.name]
    return _in_place(operator, _FUNCTIONS[operator.update_of.name])


# By the operator's name. `autograd` records their operations where a derivative has no kernel.
KERNELS = {o.name: _kernel(o, _function(o)) for o in OPERATORS if o.checkpointed_of is None}

for _name, _implementation in KERNELS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
if not has_cuda_kernels:
    for _name in ("wkv", "wkv_backward", "wkv_update", "wkv_final_state"):
        library.impl(_name, slow_on_gpus(KERNELS[_name]), "CUDA")
