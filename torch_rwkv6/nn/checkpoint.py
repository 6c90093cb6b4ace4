"""Reading an official checkpoint: which version it is, its sizes, what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["check_tensors", "model_sizes"]


def model_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of an x060 checkpoint, as arguments of `RWKV6`, from the shapes of its tensors.

    Raises:
        TypeError: not a mapping of names to floating-point tensors.
        ValueError: another version of RWKV, or no tensor that tells a size.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}"
        )
    for name, x in state_dict.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"state_dict: expected floating-point tensors, got {found} as {name}")
    version = _version(state_dict)
    if version != "x060":
        raise ValueError(f"state_dict: expected RWKV-6 x060, got {version}")
    vocab_size, n_embd = _matrix_shape(state_dict, "emb.weight")
    return {
        "vocab_size": vocab_size,
        "n_layer": len({n.split(".")[1] for n in state_dict if n.startswith("blocks.")}),
        "n_embd": n_embd,
        "head_size": _matrix_shape(state_dict, ".att.time_faaaa")[1],
        "n_ffn": _matrix_shape(state_dict, ".ffn.key.weight")[0],
        "lora_mix": _matrix_shape(state_dict, ".att.time_maa_w1")[1] // 5,  # w, k, v, r, g
        "lora_decay": _matrix_shape(state_dict, ".att.time_decay_w1")[1],
    }


def check_tensors(state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raises one ValueError that lists all missing, unexpected and misshapen tensors."""
    problems = [f"missing {n} {tuple(s)}" for n, s in expected.items() if n not in state_dict]
    for name, x in state_dict.items():
        if name not in expected:
            problems.append(f"unexpected {name} {tuple(x.shape)}")
        elif x.shape != expected[name]:
            problems.append(f"{name} expected {tuple(expected[name])}, got {tuple(x.shape)}")
    if problems:
        raise ValueError(
            f"state_dict: {len(problems)} tensors do not fit RWKV-6 x060:\n  "
            + "\n  ".join(problems)
        )


def _version(state_dict: Mapping[str, Tensor]) -> str:
    """x060, or the other version that the names belong to, in words."""
    # the name of the parameter without its layer: {"att.key.weight", "emb.weight", ...}
    names = {n.split(".", 2)[-1] if n.startswith("blocks.") else n for n in state_dict}
    for sign, version in (
        ("att.x_r", "RWKV-7"),
        ("att.time_maa_rkvw_w1", "its variant x060b or x060c"),
        ("att.gate_w1", "its variant x060a"),
    ):
        if sign in names:
            return f"{version} (it has {sign})"
    if "att.time_mix_k" in names:
        if "att.ln_x.weight" in names:
            return "RWKV-5 (it has att.time_mix_k and att.ln_x)"
        return "RWKV-4 (it has att.time_mix_k and no att.ln_x)"
    if "att.time_maa_w1" not in names:
        some = ", ".join(sorted(state_dict)[:3]) or "nothing"
        return f"a state_dict without blocks.0.att.time_maa_w1 (it has {some}, ...)"
    return "x060"


def _matrix_shape(state_dict: Mapping[str, Tensor], suffix: str) -> tuple[int, int]:
    """Of the first tensor so named, in whichever layer."""
    name, x = next(((n, x) for n, x in state_dict.items() if n.endswith(suffix)), (suffix, None))
    if x is None or x.dim() != 2:
        found = "none" if x is None else f"shape {tuple(x.shape)}"
        raise ValueError(
            f"state_dict: expected a matrix as {name}, which tells a size, got {found}"
        )
    return x.shape[0], x.shape[1]
