"""States of texts that were read before, for the prompts that begin with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from torch_rwkv6.arguments import integer
from torch_rwkv6.nn import RWKVState

__all__ = ["Cached", "PrefixCache"]


class Cached(NamedTuple):
    """What is known after some tokens."""

    state: RWKVState  # of one row
    logits: Tensor  # [1, V]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.state, self.logits))


class PrefixCache:
    """States by the tokens that they have seen; the least recently used go first.

    Args:
        max_bytes: of all states and logits together; 0 keeps none.

    Raises:
        TypeError, ValueError: max_bytes is no integer, or below 0.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = integer("cache_bytes", max_bytes, 0)
        self.bytes = 0
        self._entries: OrderedDict[bytes, Cached] = OrderedDict()  # by the tokens, int64

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int]) -> tuple[int, Cached | None, int]:
        """The longest text of the cache that the tokens begin with.

        Returns:
            Its length, what is known after it (0 and None if there is none), and how many tokens
            the text has in common with the one that shares most with it: where two texts part is
            worth a state of its own.
        """
        wanted = np.array(tokens, np.int64)
        length, found, shared = 0, b"", 0
        for key in self._entries:
            known = np.frombuffer(key, np.int64)
            size = min(len(known), len(wanted))
            different = (known[:size] != wanted[:size]).nonzero()[0]
            common = int(different[0]) if len(different) else size
            shared = max(shared, common)
            if common == len(known) > length:
                length, found = common, key
        if not length:
            return 0, None, shared
        self._entries.move_to_end(found)
        return length, self._entries[found], shared

    def put(self, tokens: Sequence[int], cached: Cached) -> None:
        """Adds what is known after the tokens, in memory of its own."""
        key = np.array(tokens, np.int64).tobytes()
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        if cached.bytes > self.max_bytes:
            return
        self._entries[key] = Cached(cached.state.clone(), cached.logits.clone())
        self.bytes += cached.bytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1].bytes

    def clear(self) -> None:
        """Forgets everything, as it must be when the model's weights change."""
        self._entries.clear()
        self.bytes = 0
