"""Inputs shared by the tests: every promise is checked on the same families of calls."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EXTREME_DECAYS = (5.0, 10.0, 20.0, 90.0, -1e9)
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """The arguments of one call of the operator; None where an option is not used."""

    r: Tensor  # [B, T, H, N]
    k: Tensor  # [B, T, H, N]
    v: Tensor  # [B, T, H, N]
    w: Tensor  # [B, T, H, N]
    u: Tensor  # [H, N]
    initial_state: Tensor | None = None  # [S, H, N, N]
    state_map: Tensor | None = None  # [B] or [M]
    cu_seqlens: Tensor | None = None  # [M + 1]

    def args(self) -> tuple[Tensor | None, ...]:
        """For torch.ops.rwkv6.wkv."""
        return (*self.floats(), self.state_map, self.cu_seqlens)

    def floats(self) -> tuple[Tensor | None, ...]:
        return (self.r, self.k, self.v, self.w, self.u, self.initial_state)

    def with_floats(self, floats: list[Tensor | None]) -> Call:
        names = ("r", "k", "v", "w", "u", "initial_state")
        return replace(self, **dict(zip(names, floats, strict=True)))

    def map(self, function) -> Call:
        return self.with_floats([x if x is None else function(x) for x in self.floats()])

    def double(self) -> Call:
        return self.map(lambda x: x.detach().double())

    def leaves(self) -> Call:
        return self.map(lambda x: x.detach().clone().requires_grad_())

    def differentiable(self) -> list[Tensor]:
        return [x for x in self.floats() if x is not None]

    @property
    def sequences(self) -> int:
        return self.r.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def grad_outputs(self) -> tuple[Tensor, Tensor]:
        """Random gradients of y and final_state."""
        _, _, H, N = self.r.shape
        acc = torch.float64 if self.r.dtype == torch.float64 else torch.float32
        grad_state = torch.randn(self.sequences, H, N, N, dtype=torch.float64).to(acc)
        return torch.randn(self.r.shape, dtype=torch.float64).to(self.r.dtype), grad_state


def random_call(
    B: int = 2,
    T: int = 5,
    H: int = 2,
    N: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    extreme: bool = False,
    w_dtype: torch.dtype | None = None,
    states: int | None = None,
    state_dtype: torch.dtype | None = None,
    state_map: list[int] | None = None,
    cu_seqlens: list[int] | None = None,
    index_dtype: torch.dtype = torch.int64,
) -> Call:
    """r, k, v, u, initial_state ~ N(0, 1), w ~ N(-2, 1); extreme: 1 % of w each of five values.

    The same numbers on every device.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu").to(device)

    w = normal(B, T, H, N) - 2
    if extreme:
        place = torch.rand(w.shape, generator=g, device="cpu").to(device)
        for i, value in enumerate(EXTREME_DECAYS):
            w[(place >= i / 100) & (place < (i + 1) / 100)] = value
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    call = Call(
        *(normal(B, T, H, N).to(dtype) for _ in range(3)),
        w.to(w_dtype or dtype),
        normal(H, N).to(dtype),
    )
    if states is not None:
        call.initial_state = normal(states, H, N, N).to(state_dtype or acc)
    if state_map is not None:
        call.state_map = torch.tensor(state_map, dtype=index_dtype)
    if cu_seqlens is not None:
        call.cu_seqlens = torch.tensor(cu_seqlens, dtype=index_dtype)
    return call


SLOW_DECAYS = ("w = -9", "w from -9 to -5")


def slow_call(decays: str) -> Call:
    """4096 tokens whose states live for thousands of them; a rounding at each would add up."""
    call = random_call(B=1, T=4096, H=2, N=16, states=1)
    call.w.uniform_(-9, -5 if decays == "w from -9 to -5" else -9)
    return call


def sample_inputs(dtype: torch.dtype = torch.float32, N: int = 4, T: int = 5) -> dict[str, Call]:
    """One call for each combination of the optional arguments."""

    def call(T: int = T, **options) -> Call:
        return random_call(T=T, N=N, dtype=dtype, **options)

    def packed(**options) -> Call:
        return call(B=1, T=T + 2, cu_seqlens=[0, T // 2, T // 2, T + 2], **options)

    return {
        "plain": call(),
        "shared state": call(states=1),
        "state each": call(states=2),
        "state map": call(B=3, states=4, state_map=[2, 0, 2]),
        "int32 state map": call(states=3, state_map=[2, 2], index_dtype=torch.int32),
        "packed": packed(),
        "packed, shared state": packed(states=1),
        "packed, state each": packed(states=3),
        "packed, state map": packed(states=2, state_map=[1, 0, 1]),
        "one token": call(T=1, states=2),
        "no token": call(T=0, states=2),
        "w in float32": call(w_dtype=torch.float32),
    }


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, both as float64; the plain norm where expected is zero."""
    difference = (found.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return difference / size if size else difference
