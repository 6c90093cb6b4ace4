"""Reading and writing files: checks of paths, and files that are written completely or not."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import torch

__all__ = ["StrPath", "device_named", "file_to_write", "reason", "written"]

StrPath: TypeAlias = "str | os.PathLike[str]"


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
def written(target: Path) -> Iterator[Path]:
    """Yields a temporary file, which replaces `target` when the block has written it completely.

    If writing fails, an existing target stays as it was. Its permissions and links to it are kept.

    Raises:
        OSError: whatever went wrong with writing.
    """
    final = target.resolve()
    part = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        part.touch()
        model = final if final.exists() else part
        mode = model.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes its files for the owner alone
        part.replace(final)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # torch.save and safetensors have exceptions of their own for it
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"cannot be written: {reason}", os.fspath(target)) from error
    finally:
        part.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """Why a file could not be read, without torch's advice to run the code in it."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)|<class '([\w.]+)'>", text)
    if found:
        return (
            f"holds Python objects ({found[1] or found[2]}), and loading those can run any code "
            "that the file brings: where it was made, save the model's state_dict() instead"
        )
    if "TorchScript" in text:
        return "is no checkpoint, but a TorchScript program"
    # "Weights only load failed", "weights_only": torch's words about its unpickler, not the file
    unclear = isinstance(error, LookupError) or "eights" in text
    why = "its pickle cannot be read" if unclear else text.partition("\n")[0]
    if isinstance(error, (OSError, EOFError)) or not why:
        why = "it ends too early or is damaged"
    return f"is no checkpoint, or a truncated one: {why}"


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
