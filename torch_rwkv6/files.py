"""Files of named tensors: checks of paths, what can be read, and writing completely or not."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "StrPath",
    "device_named",
    "file_to_write",
    "is_out_of_memory",
    "put_back",
    "read_tensors",
    "remove_parts",
    "write_tensors",
    "written",
]

StrPath: TypeAlias = "str | os.PathLike[str]"

# the first bytes of files that hold no tensors by name
_FOREIGN = (
    (b"GGUF", "a GGUF file of llama.cpp: load the .pth or .safetensors that it was made from"),
    (b"fmgg", "a file of rwkv.cpp: load the .pth that it was made from"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with git lfs pull"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them"),
    (b"<", "a web page or other text: its download went wrong"),
)


def file_to_write(path: StrPath) -> Path:
    """The path, if a file can be written there. Call it before the work whose result goes there.

    Raises:
        OSError: FileNotFoundError where its folder is missing, IsADirectoryError where a folder
            is in its place.
        TypeError, ValueError: no path, an empty one, or that of a device.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    target = Path(os.fsdecode(path))
    if not os.fsdecode(path).strip():
        raise ValueError("path: expected the name of a file, got an empty one")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"no folder {target.parent} to write a file in", str(path)
        )
    if target.exists() and not target.is_file():
        raise ValueError(f"path: expected the name of a file, got the device {path}")
    return target


@contextlib.contextmanager
def written(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yields a temporary file, which replaces `target` when the block has written it completely.

    If writing fails, or the process is killed, an existing target stays as it was. Its permissions
    and links to it are kept.

    Args:
        target: of `file_to_write`.
        folder: whether the target is a folder, and an empty one is yielded. As a folder cannot
            take the place of another in one step, `put_back` completes what a kill has interrupted.

    Raises:
        OSError: whatever went wrong with writing.
    """
    final = target.resolve()
    part = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        _remove(part)  # of a process that was killed, and had the same number
        part.mkdir() if folder else part.touch()
        model = final if final.exists() else part
        mode = model.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes its files for the owner alone
        if folder:
            old = _aside(final)
            _remove(old)
            with contextlib.suppress(FileNotFoundError):
                final.rename(old)
            part.rename(final)
            _remove(old)
        else:
            part.replace(final)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # torch.save and safetensors have exceptions of their own for it
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"cannot be written: {reason}", os.fspath(target)) from error
    finally:
        _remove(part)


def put_back(target: Path) -> None:
    """Has the folder in its place again if a kill came just when `written` replaced it."""
    final = target.resolve()
    if not final.exists():
        with contextlib.suppress(FileNotFoundError):  # there is none, or another process did it
            _aside(final).rename(final)


def remove_parts(folder: Path) -> None:
    """Removes what killed processes have left of `written` in a folder, where none writes now."""
    for part in folder.glob(".*.[0-9]*.part"):
        _remove(part)


def _aside(folder: Path) -> Path:
    """Where a folder stands while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_tensors(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Writes a ``.safetensors`` file, or one of torch.save under any other name.

    Raises:
        ImportError: the package safetensors is missing.
        OSError: whatever went wrong with writing; a file that was there is unchanged.
    """
    with written(target) as part:
        if target.suffix.lower() == ".safetensors":
            _safetensors().torch.save_file(dict(tensors), part)
        else:
            with part.open("wb") as file:
                torch.save(dict(tensors), file)


def read_tensors(path: Path, what: str = "checkpoint") -> dict[str, Any]:
    """What a file of torch.save or of safetensors has by names, on the CPU. It runs no code.

    The content tells which format it is, whatever the suffix.

    Args:
        path: of the file.
        what: the file should be, for messages.

    Raises:
        ImportError: the package safetensors is missing.
        MemoryError, RuntimeError: there is too little memory, as torch's allocators say it.
        OSError: the file cannot be read.
        ValueError: it is none of these, or holds something else.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is no {what}, but a device or pipe")
    with path.open("rb") as file:
        start = file.read(32)
    for sign, kind in _FOREIGN:
        if start.startswith(sign):
            raise ValueError(f"{path} is no {what}, but {kind}")
    try:
        if start[8:9] == b"{":  # after the header's length: see safetensors' format
            content: Any = _safetensors().torch.load_file(path)
        else:
            content = _torch_load(path)
    except (ImportError, PermissionError):
        raise
    except Exception as error:  # from the unpickler, unzipper or parser, OSError included
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{path} {_reason(error, what)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} is no {what}: it holds no tensors by name, but {type(content).__name__}"
        )
    return dict(content)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is Python's or torch's exception for too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # of the CPU's


def _torch_load(path: Path) -> Any:
    if path.suffix == ".safetensors":  # a suffix that torch.load goes by
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before 1.6


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors files need the package safetensors: pip install torch_rwkv6[text]"
        ) from error
    return safetensors


def _reason(error: Exception, what: str) -> str:
    """Why a file could not be read, without torch's advice to run the code in it."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>", text)
    if found:
        return (
            f"is no {what}: it holds Python objects ({found[1] or found[2]}), and loading those "
            "can run any code that the file brings: where it was made, save the model's "
            "state_dict() instead"
        )
    if "TorchScript" in text:
        return f"is no {what}, but a TorchScript program"
    # "Weights only load failed", "weights_only": torch's words about its unpickler, not the file
    unclear = isinstance(error, LookupError) or "eights" in text
    why = "its pickle cannot be read" if unclear else text.partition("\n")[0]
    if isinstance(error, (OSError, EOFError)) or not why:
        why = "it ends too early or is damaged"
    return f"is no {what}, or a truncated one: {why}"


def device_named(device: torch.device | str | int | None) -> torch.device:
    """The device, if this machine has it; the CPU for None.

    Raises:
        TypeError: no device and no name of one.
        ValueError: this machine does not have it, or it is meta, which holds no values.
    """
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device, type(None))):
        raise TypeError(f"device: expected a torch.device or its name, got {device!r}")
    try:
        found = torch.device("cpu" if device is None else device)
        torch.empty(0, device=found)
    except (AssertionError, ImportError, RuntimeError) as error:  # torch has no one exception
        why = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one of this machine, got {device} ({why})") from error
    if found.type == "meta":
        raise ValueError("device: expected one that holds values, got meta")
    return found
