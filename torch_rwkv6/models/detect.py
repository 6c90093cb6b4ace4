"""Detects a checkpoint's RWKV version and sizes from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torch_rwkv6.nn import RWKV, RWKV4, RWKV5, RWKV6

__all__ = ["model_of"]

# parameter names that only an unsupported version has
_REFUSED = (
    ("att.r_k", "RWKV-7"),
    ("att.x_r", "RWKV-7"),
    ("att.time_maa_rkvw_w1", "RWKV-6 x060b or x060c"),
    ("att.gate_w1", "RWKV-6 x060a"),
    ("att.time_maa_rkv_w1", "a variant of RWKV-6"),
)


def model_of(state_dict: Mapping[str, Tensor], **options: Any) -> RWKV:
    """An untrained model of the checkpoint's version and sizes, on the current default device.

    Args:
        state_dict: tensors under the official names.
        options: ln_x_eps and train_state, where they are not None.

    Raises:
        ValueError: a version that we do not have, or no tensor that tells a size.
    """
    # the name of a parameter without its layer: {"att.key.weight", "emb.weight", ...}
    names = {n.split(".", 2)[-1] if n.startswith("blocks.") else n for n in state_dict}
    for sign, version in _REFUSED:
        if sign in names:
            raise ValueError(
                f"state_dict: expected RWKV-4, RWKV-5 or RWKV-6 (x060), got {version} (it has "
                f"{sign})"
            )
    some = ", ".join(sorted(state_dict)[:3]) or "nothing"
    known = names & {"att.time_mix_k", "att.time_maa_w1"}
    if any("lora_" in name for name in state_dict):
        raise ValueError(
            "state_dict: expected a model, got one with a LoRA that is not merged: merge it where "
            "it was made (merge_and_unload of peft)"
            if known
            else f"state_dict: expected a model, got a LoRA alone (it has {some}, ...): load its "
            "model with it, load(MODEL, lora=FOLDER), FOLDER as peft's save_pretrained wrote it"
        )
    if names == {"att.time_state"}:
        raise ValueError(
            f"state_dict: expected a model, got tuned states alone (it has {some}, ...): load "
            "their model with them, load(MODEL, state=FILE)"
        )
    if not known:
        raise ValueError(
            "state_dict: expected RWKV-4, RWKV-5 or RWKV-6 (x060), got neither "
            f"blocks.0.att.time_mix_k nor blocks.0.att.time_maa_w1 (it has {some}, ...)"
        )
    sizes: dict[str, Any] = {
        "vocab_size": _matrix(state_dict, "emb.weight")[0],
        "n_embd": _matrix(state_dict, "emb.weight")[1],
        "n_layer": _layers(state_dict),
        "n_ffn": _matrix(state_dict, ".ffn.key.weight")[0],
    }
    options = {name: value for name, value in options.items() if value is not None}
    has_state = "att.time_state" in names
    if "att.time_maa_w1" in names:
        return RWKV6(
            **sizes,
            head_size=_matrix(state_dict, ".att.time_faaaa")[1],
            lora_mix=_matrix(state_dict, ".att.time_maa_w1")[1] // 5,  # w, k, v, r, g
            lora_decay=_matrix(state_dict, ".att.time_decay_w1")[1],
            **{"train_state": has_state, **options},
        )
    if "att.ln_x.weight" in names:
        decay = _first(state_dict, ".att.time_decay")  # [H, N], or [H] one number a head
        heads = 1 if decay is None or not decay.dim() else max(1, decay.shape[0])
        return RWKV5(
            **sizes,
            head_size=max(1, sizes["n_embd"] // heads),
            gate="att.gate.weight" in names,
            per_head=decay is not None and decay.numel() == heads,
            log_bonus="att.time_faaaa" not in names,
            **{"train_state": has_state, **options},
        )
    if options:
        raise ValueError(f"{', '.join(options)}: not for RWKV-4, which has neither")
    return RWKV4(**sizes)


def _layers(state_dict: Mapping[str, Tensor]) -> int:
    names = [n.split(".")[1] for n in state_dict if n.startswith("blocks.")]
    numbers = {int(n) for n in names if n.isascii() and n.isdecimal()}
    for number in range(len(numbers)):
        if number not in numbers:
            raise ValueError(
                f"state_dict: expected layers 0 to {max(numbers)}, got nothing of layer {number}"
            )
    return max(1, len(numbers))


def _matrix(state_dict: Mapping[str, Tensor], suffix: str) -> tuple[int, int]:
    """The shape of the first tensor of that name in any layer, which must be a matrix."""
    x = _first(state_dict, suffix)
    if x is None or x.dim() != 2:
        found = "none" if x is None else f"shape {tuple(x.shape)}"
        raise ValueError(
            f"state_dict: expected a matrix as {suffix}, which tells a size, got {found}"
        )
    return x.shape[0], x.shape[1]


def _first(state_dict: Mapping[str, Tensor], suffix: str) -> Tensor | None:
    return next((x for name, x in state_dict.items() if name.endswith(suffix)), None)
