"""Loading and saving checkpoints: files and state dicts of every version and naming scheme."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_rwkv6.arguments import flag, number
from torch_rwkv6.files import (
    StrPath,
    device_named,
    file_to_write,
    read_tensors,
    write_tensors,
)
from torch_rwkv6.models.detect import model_of
from torch_rwkv6.models.names import official_names, unofficial
from torch_rwkv6.models.sharded import is_sharded_checkpoint, read_sharded
from torch_rwkv6.nn import RWKV, RWKVState, quantize_int8_

__all__ = ["load", "read", "save"]

# keys under which the checkpoint of a training program may hold the model's tensors
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_MOST_PROBLEMS = 20  # that a message lists
_SUFFIXES = (".safetensors", ".bin", ".pth")  # of the checkpoints in a folder
# files that training programs and publishers store beside the weights
_BESIDE = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_")
_ADAPTER = "adapter_config.json"  # of peft, beside the adapter's tensors


def load(
    source: StrPath | Mapping[str, Any],
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    state: StrPath | Mapping[str, Any] | None = None,
    lora: StrPath | None = None,
    ln_x_eps: float | None = None,
    train_state: bool | None = None,
) -> RWKV:
    """The model of a checkpoint: RWKV-4, RWKV-5 (5.0, 5.1, 5.2) or RWKV-6 (x060).

    ::

        model = torch_rwkv6.models.load("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth")

    Version and sizes are read from the tensors' names and shapes. Tensors may be named as in the
    official files (BlinkDL), as on Hugging Face (RwkvForCausalLM, ``RWKV/v6-Finch-*-HF``,
    ``RWKV/rwkv-6-world-*``), as in fla-hub's ``rwkv6-*-finch``, whose own configuration has a
    wrong epsilon (1e-5 for 64e-5) that plays no part here, or as in web-rwkv's ``.st`` files. A
    RwkvForCausalLM must not have run in eval mode, which divides its weights in place: set its
    rescale_every to 0. The words that
    torch.compile, DDP, FSDP, activation checkpointing and Lightning put into names are taken off,
    and so is the prefix of a model that is part of a larger module.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, whatever its suffix; a checkpoint of Lightning
            or another training program that keeps the tensors under ``state_dict``,
            ``model_state_dict``, ``model`` or ``module``; a folder with the files of one Hugging
            Face repository (see `read`), or one that torch.distributed.checkpoint has written, as
            Lightning's for sharded models: the model's tensors alone are read from it; or a mapping
            of names to tensors. The tensors are copied.
        device: of the model; None is the CPU.
        dtype: of the parameters; None is that of the embedding. "int8" quantises the matrices, for
            decoding on a CPU (see `torch_rwkv6.nn.quantize_int8_`), and leaves the other parameters
            in the dtype of the embedding.
        state: tuned states, which texts then start from: a file or mapping with
            ``blocks.*.att.time_state`` alone, [H, N, N] as [value, key], as RWKV-LM and
            ``examples/train.py`` write it.
        lora: the folder of a LoRA adapter as peft's ``save_pretrained`` wrote it. Merged into the
            model by peft.
        ln_x_eps: epsilon of the GroupNorm of RWKV-5 and RWKV-6, which no checkpoint holds; None
            is the official 64e-5.
        train_state: adds ``att.time_state`` (state tuning), zero where the checkpoint has none;
            None keeps what the checkpoint has.

    Raises:
        ImportError: a package is missing: safetensors, or peft for a LoRA.
        OSError: the file cannot be read.
        TypeError: no mapping of names to floating-point tensors, or another argument's type.
        ValueError: no checkpoint (a truncated file, for instance, or a URL); several of them; a
            LoRA or tuned states alone; RWKV-7, x060a, x060b or x060c; missing, unexpected or
            misshapen tensors, which the message lists; or a device that this machine does not have.
    """
    device = device_named(device)
    int8 = isinstance(dtype, str) and dtype == "int8"
    if int8:
        dtype = None
    elif dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'dtype: expected a floating-point torch.dtype or "int8", got {dtype!r}')
    if train_state is not None:
        flag("train_state", train_state)
    if ln_x_eps is not None and number("ln_x_eps", ln_x_eps) <= 0:
        raise ValueError(f"ln_x_eps: expected a finite number above 0, got {ln_x_eps}")
    adapter = None if lora is None else _adapter(lora)
    tensors = _official(source, "source", "state_dict")
    if state is not None:
        if train_state is False:
            raise ValueError("train_state: expected True or None beside state, got False")
        tensors |= _tuned(state)
    with torch.device("meta"), _NoInitialValues():  # allocates no memory
        model = model_of(tensors, ln_x_eps=ln_x_eps, train_state=train_state)
    expected = {name: p.shape for name, p in model.named_parameters()}
    tensors = _fitting(tensors, expected, model)
    of_file = tensors["emb.weight"].dtype
    model = model.to(dtype=of_file if adapter else dtype or of_file).to_empty(device=device)
    model.load_state_dict(tensors)
    if adapter is not None:
        model = _with_lora(model, *adapter).to(dtype=dtype)  # rounded once, when it is merged
    if int8:
        quantize_int8_(model)
    return model


class _NoInitialValues(TorchFunctionMode):
    """Leaves out what PyTorch's layers draw: on the meta device that imports torch._dynamo."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


def save(model: torch.nn.Module | Mapping[str, Tensor], path: StrPath) -> None:
    """Writes the official names, as BlinkDL's files have them; the tensors byte for byte.

    Args:
        model: a model, or the state_dict of one; compiled, wrapped (DDP, FSDP) or part of a larger
            module as it may be: names become official as in `load`. Of a model sharded by FSDP2
            the tensors are gathered, which takes a call on every rank.
        path: ``.safetensors``, or any other name for a ``.pth``, in a folder that exists. The file
            appears when it is complete: one that it replaces is never lost half-way.

    Raises:
        OSError: the file cannot be written: FileNotFoundError where its folder is missing.
        TypeError: neither a model nor a mapping of names to floating-point tensors.
        ValueError: names that no RWKV model has (of a LoRA that is not merged, for instance):
            nothing would load the file.
    """
    target = file_to_write(path)
    content = model.state_dict() if isinstance(model, torch.nn.Module) else model
    if not isinstance(content, Mapping):
        raise TypeError(f"model: expected a model or a state_dict, got {type(model).__name__}")
    tensors = official_names(_checked("model", content))
    foreign = unofficial(tensors)
    if foreign or not tensors:
        some = ", ".join(foreign[:3]) + ", ..." * (len(foreign) > 3) or "none"
        hint = " (a LoRA is merged first: merge_and_unload of peft)" if "lora_" in some else ""
        raise ValueError(f"model: expected the names of an RWKV's tensors, got {some}{hint}")
    tensors = {name: _whole(name, x) for name, x in tensors.items()}
    write_tensors(tensors, target)


def read(path: StrPath) -> dict[str, Any]:
    """What a file holds by names, or all files of a Hugging Face folder: `load` without a model.

    ::

        states = torch_rwkv6.models.read("state.pth")  # {"blocks.0.att.time_state": ..., ...}

    Of a folder these are: the files that its ``*.safetensors.index.json`` or ``*.bin.index.json``
    names; otherwise its one ``.safetensors``, ``.bin`` or ``.pth`` file, or all parts of one
    (``NAME-00001-of-00002.safetensors``, ...). ``pytorch_model*.bin`` beside ``.safetensors`` is
    the same model once more and not read; nor are adapters (``adapter_*``) and a trainer's own
    files (``training_args.bin``, ``optimizer*``, ``rng_state*``, ...). A folder of
    torch.distributed.checkpoint (``.metadata`` and ``*.distcp``) is one file in this sense, with
    all its tensors, which are read on this process alone.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint, or the folder has several.
    """
    path = _existing(path, "path")
    if is_sharded_checkpoint(path):
        return read_sharded(path)
    if path.is_dir():
        return _merged(path, _files_of(path))
    if path.name.endswith(".index.json"):
        return _merged(path, _files_of_index(path))
    return read_tensors(path)


def _official(source: Any, argument: str, content: str) -> dict[str, Tensor]:
    """The tensors of a file, folder or mapping under the official names.

    Args:
        source: whatever the user gave.
        argument, content: what messages call it, and the tensors in it.
    """
    if isinstance(source, (str, os.PathLike)):
        path = _existing(source, argument)
        sharded = is_sharded_checkpoint(path)  # of the optimizer nothing need be read
        source = read_sharded(path, _innermost) if sharded else read(path)
    elif not isinstance(source, Mapping):
        raise TypeError(
            f"{argument}: expected a path or a mapping of names to tensors, got "
            f"{type(source).__name__}"
        )
    return official_names(_checked(content, _innermost(source)))


def _tuned(source: Any) -> dict[str, Tensor]:
    """Tuned states by their official names."""
    if isinstance(source, (str, os.PathLike)) and os.fsdecode(source).lower().endswith(".st"):
        raise ValueError(
            f"state: expected [value, key], got web-rwkv's {os.fsdecode(source)}, which has it "
            "transposed: load the .pth that it was made from"
        )
    tensors = _official(source, "state", "state")
    others = [name for name in tensors if not name.endswith(".att.time_state")]
    if others or not tensors:
        hint = ""
        if set(RWKVState._fields) <= set(others):
            hint = " (an RWKVState: RWKVState.load reads it, and generate goes on from it)"
        raise ValueError(
            "state: expected tuned states alone, blocks.0.att.time_state and so on, got "
            f"{', '.join(others[:3]) or 'nothing'}{hint}"
        )
    return tensors


def _adapter(folder: StrPath) -> tuple[Any, dict[str, Any]]:
    """The configuration and the tensors of a LoRA."""
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"lora: expected a folder, got {type(folder).__name__}")
    path = _existing(folder, "lora")
    if not (path / _ADAPTER).is_file():
        raise ValueError(
            f"lora: expected a folder with {_ADAPTER}, which says how the LoRA is scaled, as "
            f"peft's save_pretrained writes it, got {path}"
        )
    try:
        import peft
    except ImportError as error:
        raise ImportError("a LoRA needs the package peft: pip install peft") from error
    files = [path / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise FileNotFoundError(f"no {files[0].name} or {files[1].name} in the folder {path}")
    try:
        config = peft.PeftConfig.from_pretrained(os.fspath(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / _ADAPTER} is no configuration of peft: {error}") from error
    return config, read_tensors(found[0], "LoRA")


def _with_lora(model: RWKV, config: Any, tensors: dict[str, Any]) -> RWKV:
    """The model with the LoRA merged."""
    import peft

    try:
        tuned: Any = peft.get_peft_model(model, config)
        result: Any = peft.set_peft_model_state_dict(tuned, tensors)
    except (RuntimeError, ValueError) as error:  # of other shapes, or for other layers
        raise ValueError(f"lora: expected one for this model, got another: {error}") from error
    wrong = [*result.unexpected_keys, *(n for n in result.missing_keys if "lora_" in n)]
    if wrong:
        raise ValueError(
            f"lora: expected one for this model, got another: {len(wrong)} tensors are missing or "
            f"unexpected, such as {wrong[0]}"
        )
    merged: RWKV = tuned.merge_and_unload()
    return merged.requires_grad_(True)  # peft freezes what it adds to


def _existing(path: StrPath, argument: str) -> Path:
    text = os.fsdecode(path)
    if not text.strip():
        raise ValueError(f"{argument}: expected a file or folder, got an empty path")
    found = Path(text)
    if found.exists():
        return found
    if re.match(r"[A-Za-z][\w+.-]+:/", text):
        raise ValueError(
            f"{argument}: expected a file or folder, got the URL {text}: download it first"
        )
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and found.suffix.lower() not in (*_SUFFIXES, ".st"):
        hint = (
            f"; if that is a name on the Hugging Face hub, download it first (hf download {text} "
            "--local-dir FOLDER) and load the folder"
        )
    raise FileNotFoundError(f"no such file: {text}{hint}")


def _innermost(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors in a training program's checkpoint."""
    for name in _NESTED:
        if isinstance(content.get(name), Mapping):
            return _innermost(content[name])
    return content


def _checked(argument: str, state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    for name, x in state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names of tensors, got {name!r} as one")
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            hint = " (a model is saved before it is quantised)" * (found == torch.int8)
            raise TypeError(
                f"{argument}: expected floating-point tensors, got {found} as {name}{hint}"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{argument}: expected dense tensors, got {x.layout} as {name}")
        if x.is_meta:
            raise ValueError(
                f"{argument}: expected values, got {name} on the meta device, which has none"
            )
    return state_dict


def _whole(name: str, x: Tensor) -> Tensor:
    """The tensor gathered from all ranks, on the CPU, without the rest of a storage it views."""
    gather = getattr(x, "full_tensor", None)  # a DTensor's
    x = x.detach() if gather is None else gather().detach()
    if type(x) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"model: expected plain tensors, got {type(x).__name__} as {name}")
    return x.cpu().clone(memory_format=torch.contiguous_format)


def _merged(source: Path, files: Iterable[Path]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    whose: dict[str, str] = {}
    for file in files:
        for name, x in _innermost(read(file)).items():
            if name in tensors:
                raise _several(source, [whose[name], file.name])
            tensors[name], whose[name] = x, file.name
    return tensors


def _several(source: Path, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"{source} holds several checkpoints ({', '.join(list(names)[:3])}): load one of its files"
    )


def _files_of(folder: Path) -> list[Path]:
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    for ending in (".safetensors.index.json", ".bin.index.json"):
        indices = [f for f in files if f.name.endswith(ending)]
        if len(indices) > 1:
            raise _several(folder, (f.name for f in indices))
        if indices:
            return _files_of_index(indices[0])
    files = [f for f in files if f.suffix.lower() in _SUFFIXES and not _BESIDE.match(f.name)]
    if any(f.suffix.lower() == ".safetensors" for f in files):
        files = [f for f in files if not re.match(r"pytorch_model.*\.bin$", f.name)]
    if len({f.suffix.lower() for f in files}) > 1:
        raise _several(folder, (f.name for f in files))
    if not files and (folder / _ADAPTER).is_file():
        raise ValueError(
            f"{folder} holds a LoRA alone: load its model with it, load(MODEL, lora=FOLDER)"
        )
    if not files:
        raise FileNotFoundError(f"no *.safetensors, *.bin or *.pth in the folder {folder}")
    return _shards(folder, files)


def _shards(folder: Path, files: list[Path]) -> list[Path]:
    """The files, if they are one checkpoint: a single file, or all n of ``NAME-0000i-of-0000n``."""
    parts = [re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.\w+", f.name) for f in files]
    if len(files) == 1 and parts[0] is None:
        return files
    wholes = {(part[1], int(part[3])) if part else None for part in parts}
    if None in wholes or len(wholes) > 1:
        raise _several(folder, (f.name for f in files))
    numbers = {int(part[2]) for part in parts if part}
    missing = set(range(1, int(parts[0][3]) + 1)) - numbers  # type: ignore[index]
    if missing:
        raise FileNotFoundError(f"{folder} lacks part {min(missing)} of {files[0].name}")
    return files


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [index.with_name(name) for name in names]  # ValueError: with a folder
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of checkpoint files: {error}") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}, which {index.name} names")
    return files


def _fitting(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, torch.Size], model: RWKV
) -> dict[str, Tensor]:
    """The tensors in the model's shapes, of which files leave out dimensions of size 1.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, by name.
    """
    tensors = dict(state_dict)
    if not any(name.endswith(".att.time_state") for name in tensors):
        for name, shape in expected.items():
            if name.endswith(".att.time_state"):
                tensors[name] = torch.zeros(shape, device="cpu")
    problems = [f"missing {n} {tuple(s)}" for n, s in expected.items() if n not in tensors]
    for name, x in tensors.items():
        if name not in expected:
            problems.append(f"unexpected {name} {tuple(x.shape)}")
        elif [n for n in x.shape if n != 1] != [n for n in expected[name] if n != 1]:
            problems.append(f"{name} expected {tuple(expected[name])}, got {tuple(x.shape)}")
        else:
            tensors[name] = x.reshape(expected[name])
    if problems:
        shown = problems[:_MOST_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise ValueError(
            f"state_dict: {len(problems)} tensors do not fit RWKV-{model.version}:\n  "
            + "\n  ".join(shown)
        )
    return tensors
