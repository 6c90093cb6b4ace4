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

# The parameters of a block by the modules that hold them, in the order of rwkv6_layer in
# csrc/include/rwkv6.h.
_NAMES = {
    "ln1": ("weight", "bias"),
    "att": (
        *("time_maa_x", "time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g"),
        *("time_maa_w1", "time_maa_w2", "time_decay", "time_decay_w1", "time_decay_w2"),
        "time_faaaa",
    ),
    "att.receptance": ("weight",),
    "att.key": ("weight",),
    "att.value": ("weight",),
    "att.gate": ("weight",),
    "att.output": ("weight",),
    "att.ln_x": ("weight", "bias"),
    "ln2": ("weight", "bias"),
    "ffn": ("time_maa_k", "time_maa_r"),
    "ffn.key": ("weight",),
    "ffn.receptance": ("weight",),
    "ffn.value": ("weight",),
}
_PLAIN = {TimeMix, ChannelMix, Linear, nn.LayerNorm, nn.GroupNorm}


def decode_(
    block: Any,  # a Block
    x: Tensor,  # [B, T, D]
    att_shift: Tensor,  # [B, D], updated in place
    wkv: Tensor,  # [B, H, N, N], updated in place
    ffn_shift: Tensor,  # [B, D], updated in place
) -> Tensor | None:  # [B, T, D]
    """``block.forward_`` of one token of each sequence; None where the modules have to run.

    That is for more tokens, on other devices, while something traces or differentiates, and where
    a module of the block was replaced (LoRA), hooked or given a dtype of its own.
    """
    batch, tokens, _ = x.shape
    if (
        tokens != 1
        or not 0 < batch <= MOST_ROWS
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or not torch_rwkv6.has_kernels
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    modules = _modules(block)
    if modules is None:
        return None
    # not by attributes: nn.Module takes a microsecond for each
    parameters = [
        m._parameters[n] for m, names in zip(modules, _NAMES.values(), strict=True) for n in names
    ]
    if any(p.dtype != x.dtype or not p.is_contiguous() for p in parameters):
        return None
    if any(s.dtype != x.dtype or s.stride(1) != 1 for s in (att_shift, ffn_shift)):
        return None
    with torch._C._AutoDispatchBelowADInplaceOrView():
        y = torch.ops.rwkv6.layer_.default(
            x[:, 0], att_shift, wkv, ffn_shift, parameters, block.ln1.eps, block.att.ln_x.eps
        )
    # lets autograd notice that a tensor saved for a backward pass was overwritten since
    torch.autograd.graph.increment_version((att_shift, wkv, ffn_shift))
    return y.unsqueeze(1)


def _modules(block: Any) -> list[Any] | None:
    """The modules of _NAMES; None if one of them is not just what its class says."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return None
    inner = block._modules
    att, ffn = inner["att"], inner["ffn"]
    if type(att) is not TimeMix or type(ffn) is not ChannelMix:
        return None
    a, f = att._modules, ffn._modules
    modules = [inner["ln1"], att, a["receptance"], a["key"], a["value"], a["gate"], a["output"]]
    modules += [a["ln_x"], inner["ln2"], ffn, f["key"], f["receptance"], f["value"]]
    for m in modules:
        if (
            type(m) not in _PLAIN
            or m._forward_hooks
            or m._forward_pre_hooks
            or "forward" in m.__dict__
        ):
            return None
    return modules if inner["ln1"].eps == inner["ln2"].eps else None
