"""The chunks of `chunked` as one operator of torch, for torch.compile and torch.export.

Tracing `chunked` itself would unroll its Python loop over chunks, which takes long and is
impossible for a dynamic length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from keras_adapter.backends import chunked


@torch.library.custom_op("keras_adapter::wkv_chunks", mutates_args=())
def wkv_chunks(
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    log_decay: Tensor,  # [B, T, H, N]
    state: Tensor,  # [B, H, N, N]
) -> tuple[Tensor, Tensor]:  # [B, T, H, N], [B, H, N, N]
    y, final_state = chunked.chunks(r, k, v, log_decay, state)
    return y.contiguous(), final_state.contiguous()


@torch.library.custom_op("keras_adapter::wkv_chunks_backward", mutates_args=())
def wkv_chunks_backward(
    grad_y: Tensor,  # [B, T, H, N]
    grad_final_state: Tensor,  # [B, H, N, N]
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    log_decay: Tensor,  # [B, T, H, N]
    state: Tensor,  # [B, H, N, N]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vjp: Any = torch.func.vjp(chunked.chunks, r, k, v, log_decay, state)[1]
    grad_r, grad_k, grad_v, grad_decay, grad_state = (
        grad.contiguous() for grad in vjp((grad_y, grad_final_state))
    )
    return grad_r, grad_k, grad_v, grad_decay, grad_state


@wkv_chunks.register_fake
def _(*operands: Tensor) -> tuple[Tensor, Tensor]:
    r, state = operands[0], operands[4]
    return r.new_empty(r.shape), state.new_empty(state.shape)


@wkv_chunks_backward.register_fake
def _(*operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in operands[2:])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor, grad_final_state: Tensor) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = wkv_chunks_backward(grad_y, grad_final_state, *ctx.saved_tensors)
    return grads


wkv_chunks.register_autograd(_backward, setup_context=_save)
