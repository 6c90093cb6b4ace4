"""A layer of RWKV-6 as one operator: the way of single tokens on a CPU.

Called module by module, a layer is some seventy operations. For one token most of them take longer
to call than to compute, and meanwhile no weight is being read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import torch_rwkv6
from torch_rwkv6.nn.channel_mix import ChannelMix
from torch_rwkv6.nn.linear import MOST_ROWS, Linear
from torch_rwkv6.nn.time_mix import TimeMix

__all__ = ["decode_"]


def decode_(
    block: Any,  # a Block
    x: Tensor,  # [B, T, D]
    att_shift: Tensor,  # [B, D], updated in place
    wkv: Tensor,  # [B, H, N, N], updated in place
    ffn_shift: Tensor,  # [B, D], updated in place
) -> Tensor | None:  # [B, T, D]
    """``block.forward_`` of one token of each sequence; None where the modules have to run.

    That is for more tokens, on other devices, while something traces or transforms, and where a
    module of the block was replaced (LoRA), hooked or given a dtype of its own.
    """
    batch, tokens, _ = x.shape
    if (
        tokens != 1
        or not 0 < batch <= MOST_ROWS
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or not torch_rwkv6.has_kernels
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not _is_plain(block)
    ):
        return None
    att, ffn = block.att, block.ffn
    parameters = [  # in the order of rwkv6_layer in csrc/include/rwkv6.h
        block.ln1.weight,
        block.ln1.bias,
        att.time_maa_x,
        att.time_maa_w,
        att.time_maa_k,
        att.time_maa_v,
        att.time_maa_r,
        att.time_maa_g,
        att.time_maa_w1,
        att.time_maa_w2,
        att.time_decay,
        att.time_decay_w1,
        att.time_decay_w2,
        att.time_faaaa,
        att.receptance.weight,
        att.key.weight,
        att.value.weight,
        att.gate.weight,
        att.output.weight,
        att.ln_x.weight,
        att.ln_x.bias,
        block.ln2.weight,
        block.ln2.bias,
        ffn.time_maa_k,
        ffn.time_maa_r,
        ffn.key.weight,
        ffn.receptance.weight,
        ffn.value.weight,
    ]
    if any(p.dtype != x.dtype or not p.is_contiguous() for p in parameters):
        return None
    if any(s.dtype != x.dtype or s.stride(1) != 1 for s in (att_shift, ffn_shift)):
        return None
    y = torch.ops.rwkv6.layer_.default(
        x[:, 0], att_shift, wkv, ffn_shift, parameters, block.ln1.eps, att.ln_x.eps
    )
    return y.unsqueeze(1)


def _is_plain(block: Any) -> bool:
    """Whether the block's modules do what their classes say, and nothing else."""
    att, ffn = block.att, block.ffn
    if type(att) is not TimeMix or type(ffn) is not ChannelMix or block.ln1.eps != block.ln2.eps:
        return False
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return False
    inner = (block.ln1, block.ln2, *att._modules.values(), *ffn._modules.values())
    return all(
        type(m) in (nn.LayerNorm, nn.GroupNorm, Linear)
        and not (m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)
        for m in inner
    )
