"""Checkpoints in and out: files and state dicts of every version, under whichever names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_rwkv6.models.names import official_names
from torch_rwkv6.models.versions import model_of
from torch_rwkv6.nn import RWKV

__all__ = ["load", "read", "save"]

StrPath: TypeAlias = "str | os.PathLike[str]"


def load(
    source: StrPath | Mapping[str, Tensor],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    ln_x_eps: float | None = None,
    train_state: bool | None = None,
) -> RWKV:
    """The model of a checkpoint: RWKV-4, RWKV-5 (5.0, 5.1, 5.2) or RWKV-6 (x060).

    ::

        model = torch_rwkv6.models.load("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth")

    Version and sizes are read from the tensors' names and shapes. Tensors may be named as in the
    official files (BlinkDL), as on Hugging Face (RwkvForCausalLM, ``RWKV/v6-Finch-*-HF``,
    ``RWKV/rwkv-6-world-*``) or as in fla-hub's ``rwkv6-*-finch``, whose own configuration has a
    wrong epsilon (1e-5 for 64e-5) that plays no part here. A RwkvForCausalLM must not have run in
    eval mode, which divides its weights in place: set its rescale_every to 0.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, a folder with the files of a Hugging Face
            repository, or a mapping of names to tensors. The tensors are copied.
        device: of the model; None is the CPU.
        dtype: of the parameters; None is that of the embedding.
        ln_x_eps: epsilon of the GroupNorm of RWKV-5 and RWKV-6, which no checkpoint holds; None
            is the official 64e-5.
        train_state: adds ``att.time_state`` (state tuning), zero where the checkpoint has none;
            None keeps what the checkpoint has.

    Raises:
        OSError: the file cannot be read.
        TypeError: no mapping of names to floating-point tensors.
        ValueError: no checkpoint (a truncated file, for instance); RWKV-7, x060a, x060b or x060c;
            or missing, unexpected or misshapen tensors: the message lists all of them.
    """
    tensors = source if isinstance(source, Mapping) else None
    if tensors is None:
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                f"source: expected a path or a mapping of names to tensors, got "
                f"{type(source).__name__}"
            )
        tensors = read(source)
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"state_dict: expected floating-point tensors, got {found} as {name}")
    tensors = official_names(tensors)
    with torch.device("meta"):  # no memory, and none of the time that initial values take
        model = model_of(tensors, ln_x_eps=ln_x_eps, train_state=train_state)
    expected = {name: p.shape for name, p in model.named_parameters()}
    tensors = _fitting(tensors, expected, model)
    emb = tensors["emb.weight"]
    model = model.to(dtype=dtype or emb.dtype).to_empty(device=device or "cpu")
    model.load_state_dict(tensors)
    return model


def save(model: RWKV | Mapping[str, Tensor], path: StrPath) -> None:
    """Writes the official names, as BlinkDL's files have them; the tensors byte for byte.

    Args:
        model: a model, or the state_dict of one.
        path: ``.safetensors``, or any other name for a ``.pth``. The file appears when it is
            complete: one that it replaces is never lost half-way.

    Raises:
        OSError: the file cannot be written.
        TypeError: neither a model nor a mapping of names to tensors.
    """
    tensors = model.state_dict() if isinstance(model, torch.nn.Module) else model
    if not isinstance(tensors, Mapping):
        raise TypeError(f"model: expected a model or a state_dict, got {type(model).__name__}")
    # cloned: views would be saved with all of their storage
    tensors = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, x in tensors.items()
    }
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.suffix == ".safetensors":
            _safetensors().torch.save_file(tensors, part)
        else:
            torch.save(tensors, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read(path: StrPath) -> dict[str, Tensor]:
    """The tensors of a file, or of all files of a Hugging Face folder, under their own names.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        tensors: dict[str, Tensor] = {}
        for file in _files_of(path):
            tensors |= read(file)
        return tensors
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = _safetensors().torch.load_file(path)
        else:
            content = _torch_load(path)
    except (ImportError, PermissionError):
        raise
    except Exception as error:  # whatever the unpickler, unzipper or parser met, OSError included
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no checkpoint, or a truncated one: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no tensors by name, but {type(content).__name__}")
    return dict(content)


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before 1.6


def _files_of(folder: Path) -> list[Path]:
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            names = json.loads(index.read_text("utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of checkpoint files: {error}") from error
        return sorted({folder / name for name in names})
    for pattern in ("*.safetensors", "*.bin", "*.pth"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise FileNotFoundError(f"no *.safetensors, *.bin or *.pth in the folder {folder}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors files need the package safetensors: pip install torch_rwkv6[text]"
        ) from error
    return safetensors


def _fitting(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size], model: RWKV
) -> dict[str, Tensor]:
    """The tensors in the model's shapes, of which files leave out dimensions of size 1.

    Raises:
        ValueError: missing, unexpected or misshapen tensors: all of them.
    """
    tensors = dict(state_dict)
    if not any(name.endswith(".att.time_state") for name in tensors):
        for name, shape in expected.items():
            if name.endswith(".att.time_state"):
                tensors[name] = torch.zeros(shape)
    problems = [f"missing {n} {tuple(s)}" for n, s in expected.items() if n not in tensors]
    for name, x in tensors.items():
        if name not in expected:
            problems.append(f"unexpected {name} {tuple(x.shape)}")
        elif [n for n in x.shape if n != 1] != [n for n in expected[name] if n != 1]:
            problems.append(f"{name} expected {tuple(expected[name])}, got {tuple(x.shape)}")
        else:
            tensors[name] = x.reshape(expected[name])
    if problems:
        raise ValueError(
            f"state_dict: {len(problems)} tensors do not fit RWKV-{model.version}:\n  "
            + "\n  ".join(problems)
        )
    return tensors
