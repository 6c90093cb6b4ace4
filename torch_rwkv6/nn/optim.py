"""The official optimiser settings of RWKV-6 training."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["parameter_groups"]


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim.AdamW``, by the rules RWKV-6 was trained with.

    Three groups, of the parameters that require a gradient; an empty group is left out:

    - ``"decay_speed"``: time_decay at twice the learning rate, without weight decay. w enters as
      exp(-exp(w)), and weight decay would pull every channel to the same speed.
    - ``"matrices"``: the matrices (``.weight`` of two dimensions or more) and time_state, with
      weight decay.
    - ``"rest"``: norms, token-shift mixes, LoRAs and time_faaaa, without weight decay.

    Source: ``RWKV.configure_optimizers`` in BlinkDL/RWKV-LM, RWKV-v5/src/model.py (the one-stage
    rules with ``--layerwise_lr 1``).

    Args:
        model: an `RWKV6`, or any module that holds one.
        lr: learning rate of the matrices and of the rest.
        weight_decay: weight decay of the matrices.

    Returns:
        A list of dictionaries with the keys params, lr, weight_decay and name.
    """
    groups: dict[str, dict[str, Any]] = {
        "decay_speed": {"params": [], "lr": 2 * lr, "weight_decay": 0.0},
        "matrices": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "rest": {"params": [], "lr": lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("time_decay"):  # and not its LoRA, time_decay_w1 and time_decay_w2
            group = "decay_speed"
        elif name.endswith("time_state") or (
            name.endswith(".weight") and parameter.squeeze().dim() >= 2
        ):
            group = "matrices"
        else:
            group = "rest"
        groups[group]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]
