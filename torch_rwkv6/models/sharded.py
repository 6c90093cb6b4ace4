"""Reads the folders of torch.distributed.checkpoint (DCP), on one process and without running code.

Each process has written a ``.distcp`` file with its part of the tensors; ``.metadata``, a pickle,
says where the parts are. torch reads that with a plain `pickle.load`, which runs any code that
a pickle brings; here it may hold torch's own descriptions of tensors and nothing else.
"""

from __future__ import annotations

import pathlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torch_rwkv6.files import is_out_of_memory

__all__ = ["is_sharded_checkpoint", "read_sharded"]

_METADATA = ".metadata"
# what describes tensors, by modules
_KNOWN = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether torch.distributed.checkpoint has written the folder."""
    return (folder / _METADATA).is_file() and any(folder.glob("*.distcp"))


def read_sharded(
    folder: Path, part: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda names: names
) -> dict[str, Any]:
    """The tensors of a folder, whole and on the CPU, nested in mappings as they were saved.

    Args:
        folder: of which `is_sharded_checkpoint` is true. What is no tensor is left out.
        part: chooses, from the nested mappings, the mapping that is read.

    Raises:
        MemoryError, RuntimeError: there is too little memory, as torch's allocators say it.
        ValueError: a file is missing, damaged or truncated, or the metadata hold other objects.
    """
    # slow to import
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            with (folder / _METADATA).open("rb") as file:
                return _Unpickler(file).load()

    try:
        reader = Reader(folder)
        metadata = reader.read_metadata()
        paths = metadata.planner_data or {}
        tree: dict[str, Any] = {}
        empty = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                *groups, name = map(str, paths.get(key, (key,)))
                group = tree
                for one in groups:
                    group = group.setdefault(one, {})
                group[name] = key
                empty[key] = entry
        chosen = part(tree)
        tensors = {
            key: torch.empty(empty[key].size, dtype=empty[key].properties.dtype, device="cpu")
            for key in _leaves(chosen)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that no other process takes part
            load(tensors, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # which is no Exception
        failures = getattr(error, "failures", {0: (error, None)})
        for cause, _ in failures.values():
            if is_out_of_memory(cause):
                raise cause from None
        why = str(error).strip().rpartition("\n")[2] or type(error).__name__
        raise ValueError(f"{folder} is no checkpoint, or a damaged one: {why}") from error
    return _filled(chosen, tensors)


def _leaves(tree: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for x in tree.values():
        found += _leaves(x) if isinstance(x, Mapping) else [x]
    return found


def _filled(tree: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {
        name: _filled(x, tensors) if isinstance(x, Mapping) else tensors[x]
        for name, x in tree.items()
    }


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePath  # where it was written, on whatever system
        if name in _KNOWN.get(module, ()) or (
            module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"its metadata hold Python objects ({module}.{name}), and loading those can run any "
            "code that the file brings"
        )
