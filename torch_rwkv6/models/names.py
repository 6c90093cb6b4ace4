"""Renames RWKV weights from other naming schemes to the official names, and RWKV-6's back.

Wrappers (torch.compile, DDP, FSDP, activation checkpointing, Lightning) insert a word into every
name. Hugging Face and fla have conventions of their own: ``RWKV/rwkv-4-*`` (transformers'
RwkvForCausalLM), ``RWKV/rwkv-5-world-*``, ``RWKV/v6-Finch-*-HF`` and ``RWKV/rwkv-6-world-*``;
``fla-hub/rwkv6-*-finch``, whose layers keep the low-rank matrices transposed and in another order.
web-rwkv's ``.st`` files have names of RWKV-4 and RWKV-5 for other things in RWKV-5 and RWKV-6, and
some matrices transposed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

__all__ = ["foreign_names", "official_names", "unofficial"]

# Words that wrappers insert into names: torch.compile, DDP and DataParallel, FSDP, activation
# checkpointing, and what Lightning's strategies put around those.
_WRAPPERS = {
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
_PART = r"(?:weight|bias)$"
_OFFICIAL = re.compile(
    rf"(?:emb|head)\.weight$|ln_out\.{_PART}|blocks\.\d+\.(?:"
    rf"ln[012]\.{_PART}|(?:att|ffn)\.time_\w+$|att\.ln_x\.{_PART}|"
    r"att\.(?:receptance|key|value|gate|output)\.weight$|"
    r"ffn\.(?:receptance|key|value)\.weight$)"
)

# The beginnings of names, theirs and the official ones, the longer first; # is a number. Those of
# Hugging Face write out the letters of RWKV-4's and RWKV-5's time_mix as well.
_HUGGING_FACE = (
    ("rwkv.embeddings.", "emb."),
    ("rwkv.ln_out.", "ln_out."),
    ("rwkv.blocks.#.pre_ln.", "blocks.#.ln0."),
    ("rwkv.blocks.#.attention.", "blocks.#.att."),
    ("rwkv.blocks.#.feed_forward.", "blocks.#.ffn."),
    ("rwkv.blocks.", "blocks."),
)
_TIME_MIX = (r"(.*\.time_mix_)(k|v|r|g)(?:ey|alue|eceptance|ate)$", r"\1\2")
_FLA = (
    ("model.embeddings.", "emb."),
    ("model.norm.", "ln_out."),
    ("lm_head.", "head."),
    ("model.layers.#.pre_norm.", "blocks.#.ln0."),
    ("model.layers.#.attn_norm.", "blocks.#.ln1."),
    ("model.layers.#.ffn_norm.", "blocks.#.ln2."),
    ("model.layers.#.attn.g_norm.", "blocks.#.att.ln_x."),
    ("model.layers.#.attn.r_proj.linear.", "blocks.#.att.receptance."),
    ("model.layers.#.attn.k_proj.linear.", "blocks.#.att.key."),
    ("model.layers.#.attn.v_proj.linear.", "blocks.#.att.value."),
    ("model.layers.#.attn.g_proj.linear.", "blocks.#.att.gate."),
    ("model.layers.#.attn.o_proj.", "blocks.#.att.output."),
    ("model.layers.#.attn.bonus", "blocks.#.att.time_faaaa"),
    ("model.layers.#.attn.w_proj.linear.lora.0.weight", "blocks.#.att.time_decay_w1"),
    ("model.layers.#.attn.w_proj.linear.lora.2.weight", "blocks.#.att.time_decay_w2"),
    ("model.layers.#.attn.w_proj.linear.lora.2.bias", "blocks.#.att.time_decay"),
    ("model.layers.#.attn.x_proj.0.mu", "blocks.#.att.time_maa_x"),
    ("model.layers.#.attn.x_proj.0.linear.weight", "blocks.#.att.time_maa_w1"),
    ("model.layers.#.attn.x_proj.2.weight", "blocks.#.att.time_maa_w2"),
    ("model.layers.#.attn.", "blocks.#.att."),
    ("model.layers.#.ffn.key.mu", "blocks.#.ffn.time_maa_k"),
    ("model.layers.#.ffn.receptance.mu", "blocks.#.ffn.time_maa_r"),
    ("model.layers.#.ffn.key.linear.", "blocks.#.ffn.key."),
    ("model.layers.#.ffn.receptance.linear.", "blocks.#.ffn.receptance."),
    ("model.layers.#.ffn.", "blocks.#.ffn."),
    ("model.layers.", "blocks."),
)
_WEB_RWKV = (
    (r"(blocks\.\d+\.(?:att|ffn)\.time_)mix_", r"\1maa_"),
    (r"(blocks\.\d+\.att\.time_)first$", r"\1faaaa"),
)
_WEB_RWKV_TRANSPOSED = (
    "time_maa_w1",
    "time_maa_w2",
    "time_decay_w1",
    "time_decay_w2",
    "time_state",
)
_FLA_ORDER = "rwkvg"  # of what official checkpoints keep in the order w, k, v, r, g
_OFFICIAL_ORDER = "wkvrg"

NAMINGS = ("RWKV", "fla-hub")  # that RWKV-6 can be written in, by the hub's owners of such folders


def official_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the official names; names of no known convention stay as they are.

    The one place where wrappers' words are removed, and the prefix of a model that is part of a
    larger module (``model.`` in a LightningModule).

    Raises:
        ValueError: more than one model, or two tensors that come to one name.
    """
    tensors = _renamed(state_dict, _without_wrappers)
    for landmark, convert in (
        (r"rwkv\.blocks\.\d+\.(?:attention|feed_forward)\.", _from_hugging_face),
        (r"model\.layers\.\d+\.attn\.", _from_fla),
        (r"blocks\.\d+\.(?:att|ffn)\.", _from_blocks),
    ):
        found = [re.match(rf"((?:[^.]+\.)*?){landmark}", name) for name in tensors]
        prefixes = sorted({match[1] for match in found if match})
        if len(prefixes) > 1:
            some = " and ".join(repr(prefix) for prefix in prefixes[:2])
            raise ValueError(f"state_dict: expected one model, got several (under {some})")
        if prefixes:
            return convert(_renamed(tensors, partial(_without_prefix, prefix=prefixes[0])))
    return tensors


def foreign_names(state_dict: Mapping[str, Tensor], naming: str) -> dict[str, Tensor]:
    """The tensors of RWKV-6 as others name, shape and order them: what `official_names` reads.

    Args:
        state_dict: under the official names.
        naming: ``"RWKV"``, that of ``RWKV/v6-Finch-*-HF`` and ``RWKV/rwkv-6-world-*``, or
            ``"fla-hub"``, that of ``fla-hub/rwkv6-*-finch``.

    Raises:
        ValueError: another naming; or tuned states, which neither has.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming: expected RWKV or fla-hub, got {naming}")
    if any(name.endswith(".time_state") for name in state_dict):
        raise ValueError(f"naming: {naming} has no name for tuned states, time_state")
    if naming == "RWKV":
        return {_by_rules(name, _WRITE_HUGGING_FACE): x for name, x in state_dict.items()}
    return _to_fla(state_dict)


def unofficial(names: Iterable[str]) -> list[str]:
    """The names that no official file has."""
    return [name for name in names if not _OFFICIAL.match(name)]


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _without_prefix(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _renamed(state_dict: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for old, x in state_dict.items():
        new = rename(old)
        if new in tensors:
            raise ValueError(f"state_dict: expected one model, got two tensors for {new}")
        tensors[new] = x
    return tensors


def _rules(*pairs: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """For `_by_rules`, from beginnings of names and what takes their place."""
    return tuple((re.escape(a).replace(r"\#", r"(\d+)"), b.replace("#", r"\1")) for a, b in pairs)


_READ_HUGGING_FACE = (*_rules(*_HUGGING_FACE), _TIME_MIX)
_READ_FLA = _rules(*_FLA)
_WRITE_HUGGING_FACE = _rules(*((official, theirs) for theirs, official in _HUGGING_FACE))
_WRITE_FLA = _rules(*((official, theirs) for theirs, official in _FLA))


def _by_rules(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def _from_hugging_face(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _renamed(state_dict, lambda name: _by_rules(name, _READ_HUGGING_FACE))


def _from_fla(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    order = [_FLA_ORDER.index(c) for c in _OFFICIAL_ORDER]
    for name, x in _renamed(state_dict, lambda name: _by_rules(name, _READ_FLA)).items():
        if name.endswith(".x_bias") and x.dim() == 2 and x.shape[0] == 5:  # [5, D]
            for c, row in zip(_FLA_ORDER, x, strict=True):
                tensors[name.removesuffix("x_bias") + f"time_maa_{c}"] = row
        elif name.endswith(".time_maa_w1") and x.dim() == 2:  # [5 * rank, D], five blocks of rows
            five = x.unflatten(0, (5, -1)) if x.shape[0] % 5 == 0 else x
            tensors[name] = five[order].flatten(0, 1).T if five.dim() == 3 else x
        elif name.endswith(".time_maa_w2") and x.dim() == 2:  # [D, 5 * rank], or [D, rank] shared
            five = x.unflatten(1, (5, -1)) if x.shape[1] % 5 == 0 else x
            tensors[name] = five[:, order].permute(1, 2, 0) if five.dim() == 3 else x
        elif name.endswith((".time_decay_w1", ".time_decay_w2")):
            tensors[name] = x.T
        else:
            tensors[name] = x
    return {name: x.contiguous() for name, x in tensors.items()}


def _to_fla(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = dict(state_dict)
    order = [_OFFICIAL_ORDER.index(c) for c in _FLA_ORDER]
    for name, x in state_dict.items():
        if name.endswith(".time_maa_w1"):  # [D, 5 * rank]
            tensors[name] = x.T.unflatten(0, (5, -1))[order].flatten(0, 1)
        elif name.endswith(".time_maa_w2"):  # [5, rank, D]
            tensors[name] = x[order].permute(2, 0, 1).flatten(1)
        elif name.endswith((".time_decay_w1", ".time_decay_w2")):
            tensors[name] = x.T
        elif name.endswith(".att.time_maa_x"):
            att = name.removesuffix("time_maa_x")
            rows = [tensors.pop(f"{att}time_maa_{c}").flatten() for c in _FLA_ORDER]
            tensors[name], tensors[f"{att}x_bias"] = x.flatten(), torch.stack(rows)
        elif name.endswith((".time_decay", ".ffn.time_maa_k", ".ffn.time_maa_r")):
            tensors[name] = x.flatten()
    return {_by_rules(name, _WRITE_FLA): x.contiguous() for name, x in tensors.items()}


def _from_blocks(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From official names, or those of web-rwkv, which begin alike.

    ``assets/scripts/convert_safetensors.py`` of web-rwkv. It does not rename what RWKV-4, 5.0 and
    5.1 have. Of RWKV-5.2 it renames u alone, to what is the logarithm of u in the other two: these
    have one decay per head, [H].
    """
    if any(name.endswith(".att.time_mix_w1") for name in state_dict):
        tensors = _renamed(state_dict, lambda name: _by_rules(name, _WEB_RWKV))
        for name, x in tensors.items():
            if name.endswith(_WEB_RWKV_TRANSPOSED) and x.dim() > 1:
                tensors[name] = x.mT.contiguous()
        return tensors
    decays = [x for name, x in state_dict.items() if name.endswith(".att.time_decay")]
    multi_head = any(name.endswith(".att.ln_x.weight") for name in state_dict)
    if multi_head and any(x.dim() and x.numel() > len(x) for x in decays):  # [H, N]: RWKV-5.2
        return _renamed(state_dict, lambda name: _by_rules(name, _WEB_RWKV[1:]))
    return dict(state_dict)
