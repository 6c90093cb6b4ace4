"""AFT: attention without a product of queries and keys, on the way from attention to RWKV.

    python examples/article/aft.py

Zhai et al., "An Attention Free Transformer", arXiv:2105.14103. In every channel,

    y_t = sigmoid(q_t) * sum_s exp(k_s + w[t, s]) v_s / sum_s exp(k_s + w[t, s])

AFT-full learns a bias w[t, s] for every pair of positions, AFT-simple has none, and a causal AFT
stops the sums at t. RWKV-4 is the causal AFT whose bias is a distance times a learnt decay, one per
channel: w[t, s] = -(t - 1 - s) * decay for s < t, and a bonus u for s = t. Then both sums follow
from those of the token before, and AFT becomes an RNN.
"""

from __future__ import annotations

import math
import sys

import report
import torch
from report import cli, plt
from torch import Tensor, nn


class AFTFull(nn.Module):
    """AFT-full as in the article, with what it needs to be right.

    The article's code returns the average itself where it means to return the projected output, its
    exp(K) overflows from 89 on, and it only works for sequences of exactly max_len tokens.
    """

    def __init__(self, max_len: int, dim: int, hid_dim: int = 32, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.wq, self.wk, self.wv = (nn.Linear(dim, hid_dim) for _ in range(3))
        self.ffnn = nn.Linear(hid_dim, dim)
        self.w = nn.Parameter(torch.empty(max_len, max_len))
        nn.init.xavier_uniform_(self.w)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, dim] -> [B, T, dim]
        T = x.shape[1]
        bias = self.w[:T, :T]
        if self.causal:
            bias = without_future(bias)
        q, k, v = self.wq(x), self.wk(x), self.wv(x)  # [B, T, hid_dim]
        return self.ffnn(torch.sigmoid(q) * average(k, v, bias))


def without_future(bias: Tensor) -> Tensor:  # [T, T] -> [T, T]
    """Weight exp(-inf) = 0 for every s > t."""
    return bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), -math.inf)


def average(
    k: Tensor,  # [B, T, D]
    v: Tensor,  # [B, T, D]
    bias: Tensor,  # [T, T]
) -> Tensor:  # [B, T, D]
    """The weighted average of the values, as two matrix products.

    The largest k of a channel and the largest bias of a row cancel between the two sums: taking
    them off first keeps every exponent at 0 or below. (What then rounds to 0 is lost: in a causal
    AFT no key may be more than some 80 below a later one. rwkv4_numpy.py shows the way out.)
    """
    k = (k - k.amax(1, keepdim=True)).exp()
    bias = (bias - bias.amax(1, keepdim=True)).exp()
    return (bias @ (k * v)) / (bias @ k)


def double_loop(k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The formula, literally, in float64; bias [T, T], or [T, T, D] with one for each channel."""
    k, v, bias = k.double(), v.double(), bias.double()
    y = torch.empty_like(v)
    for b in range(k.shape[0]):
        for t in range(k.shape[1]):
            num, den = torch.zeros_like(v[b, t]), torch.zeros_like(v[b, t])
            for s in range(k.shape[1]):
                weight = torch.exp(k[b, s] + bias[t, s])  # [D]
                num, den = num + weight * v[b, s], den + weight
            y[b, t] = num / den
    return y


def articles_average(k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As the article has it."""
    return (bias.exp() @ (k.exp() * v)) / (bias.exp() @ k.exp())


def rwkv4_bias(length: int, decay: Tensor, bonus: Tensor) -> Tensor:
    """decay, bonus [D] -> RWKV-4's position biases, [T, T, D]."""
    t = torch.arange(length)
    distance = (t[:, None] - t - 1)[..., None]  # [T, T, 1]: -1 at the token itself
    bias = torch.where(distance >= 0, -distance * decay, bonus)
    return torch.where(distance >= -1, bias, -math.inf)


def rwkv4_recurrence(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """k, v [B, T, D], decay, bonus [D] -> [B, T, D]: numerator and denominator as running sums."""
    num = den = torch.zeros_like(k[:, 0])
    outputs = []
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        now = torch.exp(bonus + key)
        outputs.append((num + now * value) / (den + now))
        num = torch.exp(-decay) * num + torch.exp(key) * value
        den = torch.exp(-decay) * den + torch.exp(key)
    return torch.stack(outputs, 1)


def looks_ahead(model: AFTFull, x: Tensor) -> str:
    """Whether an output changes with a later token; x [B, T, dim]."""
    changed = x.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        same = torch.allclose(model(x)[:, :-1], model(changed)[:, :-1], atol=1e-6)
    return "no" if same else "yes"


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--length", type=cli.positive, default=32, help="tokens")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    B, T, D = 2, args.length, 8
    k, v, x = torch.randn(3, B, T, D)
    w = torch.randn(T, T)
    biases = {"AFT-full": w, "AFT-simple": torch.zeros(T, T), "causal AFT": without_future(w)}
    rows = []
    for name, bias in biases.items():
        model = AFTFull(T, D, causal=name == "causal AFT")
        nn.init.zeros_(model.w) if name == "AFT-simple" else model.w.data.copy_(w)
        exact = double_loop(k, v, bias)
        # keys beyond what exp() of a float32 holds; adding a constant changes no average
        large = (f(k + 100, v, bias) for f in (average, articles_average))
        off = (report.difference(y, exact) for y in (average(k, v, bias), *large))
        rows.append((name, *off, looks_ahead(model, x)))
    decay, bonus = torch.logspace(-2, 0.5, D), torch.full((D,), 0.5)
    rwkv4 = rwkv4_bias(T, decay, bonus)
    off = report.difference(rwkv4_recurrence(k, v, decay, bonus), double_loop(k, v, rwkv4))
    rows.append(("RWKV-4, as an RNN", off, "", "", "no"))
    header = ("off the double loop", "by", "keys + 100", "the article's", "looks ahead")
    report.table(header, rows)

    figure, panels = plt.subplots(1, 4, figsize=(13, 3.4))
    shown = {name: biases[name] for name in ("AFT-full", "causal AFT")}
    shown |= {"RWKV-4, a slow channel": rwkv4[..., 1], "RWKV-4, a fast one": rwkv4[..., -2]}
    for axes, (name, bias) in zip(panels, shown.items(), strict=True):
        weight = (bias - bias.amax(1, keepdim=True)).exp()
        axes.imshow(weight.numpy(), vmin=0, vmax=1, cmap="magma")
        axes.set(title=name, xlabel="s")
    panels[0].set(ylabel="t")
    figure.suptitle("exp(w[t, s]), every row relative to its largest")
    report.save(figure, args.out, "aft")


if __name__ == "__main__":
    sys.exit(main())
