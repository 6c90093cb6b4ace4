"""llama.cpp, called through the C interface that the package llama-cpp-python brings."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 512  # tokens in a call


def find(rivals: Path) -> Any:
    """The module, from where it is installed or `python -m benchmarks rivals` put it; or None."""
    folder = str(rivals.absolute() / "llama.cpp")
    if folder not in sys.path:
        sys.path.append(folder)  # last: it brings packages that are here already
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except ImportError as error:
        print(
            f"{error.name or error} is missing (python -m benchmarks rivals llama.cpp): timed "
            "without llama.cpp"
        )
        return None
    return llama_cpp


class Llama:
    """A GGUF file's model with one sequence.

    Raises:
        RuntimeError: llama.cpp cannot load it.
    """

    def __init__(self, llama_cpp: Any, path: Path) -> None:
        self.api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 2**20, LONGEST, LONGEST
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot run {path}")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)

    def set_threads(self, count: int) -> None:
        self.api.llama_set_n_threads(self._context, count, count)

    def restart(self) -> None:
        """Begins a new sequence."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self._context), True)

    def forward(self, tokens: Sequence[int]) -> Any:
        """Logits after the last token, [V]: a view of memory that the next call overwrites."""
        array = (self.api.llama_token * len(tokens))(*tokens)  # the batch points into it
        batch = self.api.llama_batch_get_one(array, len(tokens))
        status = self.api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")
        logits = self.api.llama_get_logits(self._context)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (self.vocab_size,))
