"""Checkpoints that transformers does not read and write itself: other namings, and other files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import GenerationConfig

from torch_rwkv6.hf.config import RWKV6Config
from torch_rwkv6.models import load
from torch_rwkv6.models.names import unofficial
from torch_rwkv6.nn import RWKV6

__all__ = ["as_state_dict", "needs_conversion", "write_config"]


def needs_conversion(source: Any, options: dict[str, Any]) -> bool:
    """Whether transformers cannot read the tensors itself, or not under these names.

    Args:
        source: what ``from_pretrained`` was given.
        options: its keyword arguments.
    """
    if options.get("state_dict") is not None or not isinstance(source, (str, os.PathLike)):
        return False
    path = _path(source, options)
    if not path.is_dir():
        return path.is_file()
    names: list[str] = []
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names += json.loads(index.read_text("utf-8"))["weight_map"]
    elif (path / "model.safetensors").is_file():
        with safe_open(path / "model.safetensors", "pt") as file:
            names += file.keys()
    else:
        return any(path.glob("*.bin")) or any(path.glob("*.pth"))
    return bool(unofficial(names))


def as_state_dict(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with which ``from_pretrained`` loads this without reading a file.

    Raises:
        OSError, TypeError, ValueError: as `torch_rwkv6.models.load`; or it is no RWKV-6.
    """
    path = _path(source, options)
    options = {name: value for name, value in options.items() if name != "subfolder"}
    config = options.pop("config", None)
    folder = path if path.is_dir() else path.parent
    if not isinstance(config, RWKV6Config):
        settings = {n: options.pop(n) for n in RWKV6Config.__annotations__ if n in options}
        if (folder / "config.json").is_file():
            config = RWKV6Config.from_pretrained(config or folder, **settings)
        else:
            config = RWKV6Config(**settings)
    model = load(path)
    if not isinstance(model, RWKV6):
        raise ValueError(
            f"pretrained_model_name_or_path: expected RWKV-6, got RWKV-{model.version} in {path}"
        )
    config.take_sizes(model)
    if (folder / "generation_config.json").is_file():
        options.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
    return {**options, "config": config, "state_dict": model.state_dict()}


def write_config(config: RWKV6Config, naming: str, folder: str | os.PathLike[str]) -> None:
    """Rewrites a folder's config.json for the code that reads the naming.

    Args:
        config: of the model in the folder, with all sizes.
        naming: as for `torch_rwkv6.models.names.foreign_names`.
        folder: what ``save_pretrained`` wrote.
    """
    path = Path(folder, "config.json")
    settings = json.loads(path.read_text("utf-8"))
    for name in ("lora_mix", "lora_decay", "ln_x_eps", "train_state"):
        settings.pop(name)
    settings["intermediate_size"] = config.intermediate_size
    if naming == "RWKV":  # configuration_rwkv6.py and modeling_rwkv6.py of its repositories
        settings |= {
            "architectures": ["Rwkv6ForCausalLM"],
            "attention_hidden_size": config.hidden_size,
            "head_size_divisor": 8,
            "layer_norm_epsilon": 1e-5,
        }
    else:  # fla/models/rwkv6
        for name in ("head_size", "num_attention_heads"):
            settings.pop(name)
        settings |= {
            "architectures": ["RWKV6ForCausalLM"],
            "expand_k": 1.0,
            "expand_v": 1.0,
            "gate_low_rank_dim": config.lora_decay,
            "hidden_act": "sqrelu",
            "norm_bias": True,
            "norm_eps": config.ln_x_eps,
            "norm_first": True,
            "num_heads": config.num_attention_heads,
            "proj_low_rank_dim": config.lora_mix,
        }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _path(source: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    return Path(source, options.get("subfolder") or "")
