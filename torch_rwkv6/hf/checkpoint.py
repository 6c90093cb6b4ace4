"""Checkpoints that transformers does not read itself: other namings, and other files."""

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

__all__ = ["as_state_dict", "needs_conversion"]


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


def _path(source: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    return Path(source, options.get("subfolder") or "")
