"""A whole RWKV-6 layer as one operator, for decoding single tokens on a CPU.

Called module by module, a layer is about seventy operations. For one token, calling most of them
takes longer than computing them, and no weights are read from memory meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_rwkv6._torch_private import below_inplace_or_view
from torch_rwkv6.nn.channel_mix import ChannelMix
from torch_rwkv6.nn.fast_path import (
    MOST_ROWS,
    are_plain,
    eager_inference,
    register,
    unchanged,
)
from torch_rwkv6.nn.int8 import Int8Linear
from torch_rwkv6.nn.time_mix import TimeMix

__all__ = ["decode_"]

# The parameters of a block by the modules that hold them, in the order that decode_layer takes them
# in: that of csrc/include/rwkv6_layer_parameters.inc.
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
register(TimeMix, ChannelMix)


def decode_(
    block: Any,  # a Block
    x: Tensor,  # [B, T, D]
    att_shift: Tensor | None,  # [B, D], updated in place
    wkv: Tensor | None,  # [B, H, N, N], updated in place
    ffn_shift: Tensor | None,  # [B, D], updated in place
) -> Tensor | None:  # [B, T, D]
    """The block's output for one token per sequence, or None if the modules must be called.

    They must be called for more tokens or many sequences, for the mixes of other versions, for
    modules of different dtypes, and wherever `torch_rwkv6.nn.fast_path` forbids a fast path.
    """
    if not eager_inference(x) or x.shape[1] != 1 or not 0 < x.shape[0] <= MOST_ROWS:
        return None
    modules = _modules(block)
    if modules is None:
        return None
    # Not by attribute access, which costs a microsecond each on an nn.Module.
    parameters: list[Any] = []
    matrices: list[Any] = []  # of these, those of int8
    others: list[Any] = []
    scales: list[Any] = []
    for module, names in zip(modules, _NAMES.values(), strict=True):
        if type(module) is Int8Linear:
            own = [module._buffers.get("weight")]
            matrices += own
            scales.append(module._buffers.get("scale"))
        else:
            own = [module._parameters.get(n) for n in names]
            others += own
        parameters += own
    if not (
        are_plain(others, x.dtype)
        and are_plain(matrices, torch.int8)
        and are_plain(scales, torch.float32)
    ):
        return None
    for s in (att_shift, ffn_shift):
        if type(s) is not Tensor or not s.is_cpu or s.dtype != x.dtype or s.stride(1) != 1:
            return None
    if type(wkv) is not Tensor or not wkv.is_cpu:
        return None
    with below_inplace_or_view():
        y = torch.ops.rwkv6.decode_layer.default(
            x[:, 0],
            *(att_shift, wkv, ffn_shift),
            *(parameters, scales),
            *(block.ln1.eps, block.att.ln_x.eps),
        )
    # Lets autograd notice that a tensor saved for a backward pass has been overwritten.
    torch.autograd.graph.increment_version((att_shift, wkv, ffn_shift))  # type: ignore[arg-type]
    return y.unsqueeze(1)


def _modules(block: Any) -> list[Any] | None:
    """The modules of _NAMES, or None if calling them would compute something else."""
    inner: dict[str, Any] = block._modules
    att, ffn = inner["att"], inner["ffn"]
    if type(att) is not TimeMix or type(ffn) is not ChannelMix:
        return None
    a: dict[str, Any] = att._modules
    f: dict[str, Any] = ffn._modules
    linears: list[Any] = [a["receptance"], a["key"], a["value"], a["gate"], a["output"]]
    linears += [f["key"], f["receptance"], f["value"]]
    kinds = {type(m) for m in linears}
    if kinds == {nn.Linear}:
        if any(m._parameters["bias"] is not None for m in linears):
            return None
    elif kinds != {Int8Linear}:
        return None
    ln1, ln2, ln_x = inner["ln1"], inner["ln2"], a["ln_x"]
    if (type(ln1), type(ln2), type(ln_x)) != (nn.LayerNorm, nn.LayerNorm, nn.GroupNorm):
        return None
    if ln1.eps != ln2.eps or ln_x.num_groups != att.n_head:
        return None
    modules = [ln1, att, *linears[:5], ln_x, ln2, ffn, *linears[5:]]
    return modules if all(map(unchanged, modules)) else None
