"""Causal softmax attention by hand, and what it costs as the text grows.

    python examples/article/attention.py

Every token looks at all tokens before it at once, nothing is forgotten, and all positions are
computed side by side. The price: T tokens make T x T scores, and decoding has to keep the keys and
values of every token (the KV cache). RWKV-6 replaces the score matrix by a recurrence over a state
of constant size; both are timed here on the same queries, keys and values.
"""

from __future__ import annotations

import math
import sys

import report
import torch
from report import cli, plt
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from torch_rwkv6 import wkv

HEADS, HEAD_SIZE = 4, 64


def attention(
    q: Tensor,  # [B, H, T, N], the last T tokens
    k: Tensor,  # [B, H, S, N], all S tokens
    v: Tensor,  # [B, H, S, N]
    causal: bool = True,
) -> tuple[Tensor, Tensor]:  # [B, H, T, N], [B, H, T, S]
    """Outputs and weights: softmax(q k^T / sqrt(N)) v. Vaswani et al., arXiv:1706.03762."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # [B, H, T, S]
    T, S = scores.shape[2:]
    if causal:  # token t is at position S - T + t and sees no later one
        future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        scores = scores.masked_fill(future, -math.inf)
    weights = scores.softmax(3)
    return weights @ v, weights


def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, H, T, N] each, and out
    """The same, token by token, over a cache of keys and values that grows."""
    outputs = []
    for t in range(q.shape[2]):
        cache = k[:, :, : t + 1], v[:, :, : t + 1]
        outputs.append(attention(q[:, :, t : t + 1], *cache)[0])
    return torch.cat(outputs, 2)


def random_qkv(length: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, HEADS, length, HEAD_SIZE)
    return q, k, v


def checks() -> list[tuple[str, str]]:
    """What is claimed of attention, each with the largest difference from it."""
    q, k, v = random_qkv(48)
    y, _ = attention(q, k, v)
    fused = scaled_dot_product_attention(q, k, v, is_causal=True)
    order = torch.randperm(48)
    shuffled = attention(*(x[:, :, order] for x in (q, k, v)), causal=False)[0]
    return [
        ("torch's scaled_dot_product_attention", report.difference(y, fused)),
        ("decoding with a KV cache", report.difference(y, decode(q, k, v))),
        (
            "without mask, tokens in another order give the same outputs, reordered",
            report.difference(shuffled, attention(q, k, v, causal=False)[0][:, :, order]),
        ),
    ]


def milliseconds(call: str, **names: object) -> float:
    timer = Timer(call, globals=names, num_threads=torch.get_num_threads())
    return timer.adaptive_autorange(min_run_time=0.02, max_run_time=0.4).median * 1e3


@torch.inference_mode()
def cost(length: int) -> dict[str, float]:
    """Milliseconds of a whole text and of one more token, and KiB kept, at this length."""
    q, k, v = random_qkv(length)
    r, key, value = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [B, T, H, N]
    w, u = torch.randn_like(r) - 2, torch.zeros(HEADS, HEAD_SIZE)
    state = wkv(r, key, value, w, u)[1]
    last = [x[:, -1:] for x in (r, key, value, w)]
    fused = "f(q, k, v, is_causal=True)"
    return {
        "attention, by hand": milliseconds("f(q, k, v)", f=attention, q=q, k=k, v=v),
        "attention, fused": milliseconds(fused, f=scaled_dot_product_attention, q=q, k=k, v=v),
        "WKV6": milliseconds("f(*x)", f=wkv, x=(r, key, value, w, u)),
        "attention, a token": milliseconds("f(q, k, v)", f=attention, q=q[:, :, -1:], k=k, v=v),
        "WKV6, a token": milliseconds("f(*x)", f=wkv, x=(*last, u, state)),
        "KV cache": (k.numel() + v.numel()) * 4 / 1024,
        "WKV6 state": state.numel() * 4 / 1024,
    }


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--longest", type=cli.positive, default=4096, help="tokens")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    report.table(("attention by hand against", "max difference"), checks())
    lengths = [n for n in (2**i for i in range(6, 24)) if n <= args.longest] or [args.longest]
    costs = [cost(length) for length in lengths]
    print(f"\nmilliseconds for {HEADS} heads of {HEAD_SIZE}, KiB kept:\n")
    header = ("tokens", *costs[0])
    rows = ((n, *(f"{x:.3g}" for x in c.values())) for n, c in zip(lengths, costs, strict=True))
    report.table(header, rows)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
    _, weights = attention(*random_qkv(24))
    left.imshow(weights[0, 0].numpy(), cmap="magma")
    left.set(title="causal: no weight on the future", xlabel="token looked at", ylabel="token")
    for name in costs[0]:
        axes = right if name in ("KV cache", "WKV6 state") else middle
        axes.loglog(lengths, [c[name] for c in costs], marker=".", label=name)
    middle.set(title="time", xlabel="tokens", ylabel="ms")
    right.set(title="kept for decoding", xlabel="tokens", ylabel="KiB")
    for axes in (middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    report.save(figure, args.out, "attention")


if __name__ == "__main__":
    sys.exit(main())
