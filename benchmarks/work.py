"""What contenders compute and what they return. Imports no framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

GRADIENTS = ("grad_r", "grad_k", "grad_v", "grad_w", "grad_u", "grad_state")
OUTPUTS = {
    "forward": ("y", "state"),
    "backward": GRADIENTS,
    "forward + backward": GRADIENTS,
    "decode": ("y", "state"),  # one token a call, the state carried from call to call
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROMISES = {  # relative RMS error that torch_rwkv6 promises
    ("float32", "forward"): 1e-6,
    ("float32", "decode"): 1e-6,
    ("float32", "backward"): 5e-6,
    ("float32", "forward + backward"): 5e-6,
}
HALF_PROMISE = 2.5e-3


@dataclass(frozen=True)
class Work:
    """One piece of work: a kind of OUTPUTS on tensors of one shape."""

    kind: str
    B: int
    T: int
    H: int
    N: int
    dtype: str = "float32"
    extreme: bool = False  # 1 % of w at each of 5, 10, 20, 90 and -1e9

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} H{self.H} N{self.N}"

    @property
    def tokens(self) -> int:
        """Tokens times heads, by which times are divided."""
        return self.B * self.T * self.H

    @property
    def promise(self) -> float:
        return PROMISES.get((self.dtype, self.kind), HALF_PROMISE)

    @property
    def tensor_bytes(self) -> int:
        """One [B, T, H, N] tensor."""
        return self.tokens * self.N * BYTES[self.dtype]

    @property
    def state_bytes(self) -> int:
        """[B, H, N, N] in float32."""
        return self.B * self.H * self.N**2 * 4

    @property
    def streams(self) -> tuple[int, int]:
        """How many [B, T, H, N] tensors must be read and written at least."""
        forward, backward = (4, 1), (5, 4)  # r k v w -> y; r k v w dy -> dr dk dv dw
        return {
            "backward": backward,
            "forward + backward": (forward[0] + backward[0], forward[1] + backward[1]),
        }.get(self.kind, forward)

    @property
    def traffic(self) -> int:
        """Bytes that must be read and written at least: each tensor and the state once each way."""
        passes = 1 if self.kind in ("forward", "decode", "backward") else 2
        return sum(self.streams) * self.tensor_bytes + 2 * passes * self.state_bytes

    @property
    def footprint(self) -> int:
        """Bytes of all inputs and outputs; with their gradients where the kind makes them."""
        forward = 5 * self.tensor_bytes + 2 * self.state_bytes
        return forward if self.kind in ("forward", "decode") else 2 * forward

    def small(self, *, tokens: int) -> Work:
        """The same on fewer tokens and with extreme decays."""
        return replace(self, T=min(self.T, tokens), extreme=True)


@dataclass
class Job:
    """One contender, ready to do one piece of work."""

    call: Callable[[], Any]  # does it once and returns when it is done
    arrays: Callable[[Any], Arrays] | None = None  # what `call` returned, as OUTPUTS; None: a limit
    version: str = ""
    repeats: int = 1  # how often one call does the work


class UnsupportedError(Exception):
    """The contender cannot do this kind of work; the message says why."""
