"""The operator against the recurrence in PyTorch, forward and backward, checked before timed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.timing import interleave, machine_line
from torch_rwkv6 import reference, wkv

SHAPES = [(1, 512, 16, 64), (4, 128, 16, 64)]  # B, T, H, N


def main() -> None:
    print(machine_line())
    title = "ns per token and head, N = 64, float32"
    print(f"{title:52} {'min':>8} {'median':>8} {'ratio of min':>13}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for B, T, H, N in SHAPES:
            torch.manual_seed(0)
            x = [torch.randn(B, T, H, N) for _ in range(3)]
            x += [torch.randn(B, T, H, N) - 2, torch.randn(H, N)]
            exact = reference.wkv(*(a.double() for a in x))[0]
            error = (wkv(*x)[0].double() - exact).norm() / exact.norm()
            assert error < 1e-6, f"relative error {error:.1e}"
            leaves = [a.requires_grad_() for a in x]

            def step(
                f: Callable[..., tuple[torch.Tensor, torch.Tensor]],
                leaves: list[torch.Tensor] = leaves,
            ) -> None:
                torch.autograd.grad(f(*leaves)[0].sum(), leaves)

            def forward(
                f: Callable[..., tuple[torch.Tensor, torch.Tensor]],
                leaves: list[torch.Tensor] = leaves,
            ) -> None:
                with torch.no_grad():
                    f(*leaves)

            seconds = interleave(
                {
                    "forward, torch_rwkv6": lambda: forward(wkv),
                    "forward, PyTorch loop": lambda: forward(reference.wkv),
                    "forward + backward, torch_rwkv6": lambda: step(wkv),
                    "forward + backward, PyTorch loop": lambda: step(reference.wkv),
                },
                rounds=5,
            )
            for name, (least, median) in seconds.items():
                per = 1e9 / (B * T * H)
                ours = seconds[name.replace("PyTorch loop", "torch_rwkv6")][0]
                label = f"B{B} T{T} H{H}, {threads} threads, {name}"
                print(f"{label:52} {least * per:8.0f} {median * per:8.0f} {least / ours:12.1f}x")
