"""From RWKV-4 over RWKV-5 to RWKV-6: what changed, term by term, on the same input.

    python examples/article/rwkv4_to_6.py
    python examples/article/rwkv4_to_6.py --checkpoint runs/article/rwkv6.pth --layer 1

The time mixing of one layer of an RWKV-6 reads a text; then its terms are removed one after the
other, back to RWKV-4, all with the same matrices for r, k, v and the output. Every stage runs on
the operator of RWKV-6, of which all of them are special cases.

RWKV-4: Peng et al., arXiv:2305.13048. RWKV-5 and 6: arXiv:2404.05892.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

import aft
import report
import torch
from corpus import tokenizer_of
from report import cli, plt
from torch import Tensor
from torch.nn.functional import group_norm, silu

from torch_rwkv6 import wkv
from torch_rwkv6.models import load
from torch_rwkv6.nn import RWKV6, TimeMix

Parameters = Mapping[str, Tensor]


class Stage(NamedTuple):
    """A version of time mixing, by the terms it has."""

    name: str
    new: str  # against the stage before
    matrix_state: bool = True
    gate: bool = True
    decay: str = "channel"  # how many there are: one a head, one a channel, one a token
    lora_shift: bool = False


STAGES = (
    Stage("4", "a vector as state: averages by exp(k)", matrix_state=False, gate=False),
    Stage("5.0", "a matrix per head as state, read by r", gate=False, decay="head"),
    Stage("5.1", "a gate, silu(g)", decay="head"),
    Stage("5.2", "a decay for every channel"),
    Stage("6, shift", "a token shift that depends on the tokens", lora_shift=True),
    Stage("6", "a decay that depends on the token", decay="token", lora_shift=True),
)


class Mixed(NamedTuple):
    """What a stage makes of its input."""

    y: Tensor  # [T, D], the output
    weights: Tensor  # [H, T, T] or [D, T, T] for RWKV-4: of value s in y at t, computed directly
    direct: Tensor  # [T, D], the output again, from these weights
    decay: Tensor  # [T, D], exp(-exp(w))
    state: int  # numbers kept between two tokens, with the token for the shift


def shifts(x: Tensor, p: Parameters, lora: bool) -> tuple[Tensor, ...]:
    """x [T, D] -> the inputs of w, k, v, r and g, [T, D]: mixes of x and the token before.

    RWKV-4 and 5 learn one number a channel; RWKV-6 adds a LoRA of the tokens themselves.
    """
    change = torch.cat((torch.zeros_like(x[:1]), x[:-1])) - x  # [T, D]
    maa = torch.stack([p[f"time_maa_{name}"].view(-1) for name in "wkvrg"])[:, None]  # [5, 1, D]
    if lora:
        low = torch.tanh((x + change * p["time_maa_x"].view(-1)) @ p["time_maa_w1"])
        low = low.view(len(x), 5, -1).transpose(0, 1)  # [5, T, lora_mix]
        maa = maa + low @ p["time_maa_w2"]  # [5, T, D]
    return (x + change * maa).unbind()


def raw_decay(x: Tensor, p: Parameters, kind: str, heads: tuple[int, int]) -> Tensor:
    """w [T, D], where decay = exp(-exp(w)); x [T, D] is the input of w."""
    w = p["time_decay"].view(-1)  # [D]
    if kind == "head":
        w = w.view(heads).mean(1, keepdim=True).expand(heads).reshape(-1)
    if kind == "token":
        return w + torch.tanh(x @ p["time_decay_w1"]) @ p["time_decay_w2"]
    return w.expand(x.shape)


def mix(x: Tensor, p: Parameters, stage: Stage) -> Mixed:
    """One stage of time mixing, x [T, D]."""
    T, D = x.shape
    H, N = heads = p["time_faaaa"].shape
    x_w, x_k, x_v, x_r, x_g = shifts(x, p, stage.lora_shift)
    r, k, v = (
        y @ p[f"{name}.weight"].T for name, y in (("receptance", x_r), ("key", x_k), ("value", x_v))
    )
    w, u = raw_decay(x_w, p, stage.decay, heads), p["time_faaaa"]  # [T, D], [H, N]
    decay = torch.exp(-torch.exp(w))

    if not stage.matrix_state:
        # WKV-4 = num / den: the recurrence of WKV6 with the key exp(k), the values (v, 1) and the
        # bonus exp(u). One key a channel: heads of size 2 whose other key is zero.
        zero, one = torch.zeros_like(k), torch.ones_like(v)
        sums, _ = wkv(
            torch.stack((one, zero), -1)[None],  # [1, T, D, 2]
            torch.stack((k.exp(), zero), -1)[None],
            torch.stack((v, one), -1)[None],
            torch.stack((w, w), -1)[None],
            torch.stack((u.exp().view(-1), zero[0]), -1),  # [D, 2]
        )
        num, den = sums[0].unbind(-1)  # [T, D]
        weights = (k + aft.rwkv4_bias(T, torch.exp(w[0]), u.view(-1))).softmax(1)  # [T, S, D]
        outputs = (num / den, torch.einsum("tsd,sd->td", weights, v))
        y, direct = ((torch.sigmoid(r) * z) @ p["output.weight"].T for z in outputs)
        return Mixed(y, weights.permute(2, 0, 1), direct, decay, 3 * D)

    shape = (1, T, H, N)
    z, _ = wkv(*(a.view(shape) for a in (r, k, v)), w.reshape(shape), u)  # [1, T, H, N]
    weights = matrix_weights(*(a.view(T, H, N) for a in (r, k, decay)), u)  # [H, T, T]
    outputs = (z[0], torch.einsum("hts,shn->thn", weights, v.view(T, H, N)))
    g = silu(x_g @ p["gate.weight"].T) if stage.gate else 1.0
    y, direct = (
        (group_norm(z.reshape(T, D), H, p["ln_x.weight"], p["ln_x.bias"], 64e-5) * g)
        @ p["output.weight"].T
        for z in outputs
    )
    return Mixed(y, weights, direct, decay, H * N * N + D)


def matrix_weights(r: Tensor, k: Tensor, decay: Tensor, u: Tensor) -> Tensor:
    """r, k, decay [T, H, N], u [H, N] -> the attention that WKV6 amounts to, [H, T, T]."""
    T, H, _ = r.shape
    weights = r.new_zeros(H, T, T)
    for t in range(T):
        faded = r[t]  # [H, N], times the decays between s and t
        weights[:, t, t] = (r[t] * u * k[t]).sum(1)
        for s in reversed(range(t)):
            weights[:, t, s] = (faded * k[s]).sum(1)
            faded = faded * decay[s]
    return weights


def layer_input(model: RWKV6, layer: int, tokens: list[int]) -> tuple[TimeMix, Tensor]:
    """A layer's time mixing and what it reads of the text, [T, D]."""
    att, seen = model.blocks[layer].att, []
    with att.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(torch.tensor([tokens]))
    return att, seen[0][0]


def random_model() -> RWKV6:
    """Initial values, and noise where they are zero: every term says something."""
    model = RWKV6(256, 2, 64, 16, lora_mix=8, lora_decay=8)
    for name, parameter in model.named_parameters():
        if name.endswith(("_w1", "_w2", "key.weight", "output.weight", "value.weight")):
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.emb.weight)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@cli.command
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--checkpoint", help="of RWKV-6; by default a random one")
    parser.add_argument("--tokenizer", help=cli.TOKENIZER)
    parser.add_argument("--layer", type=cli.integer(0), default=0, help="whose time mixing")
    parser.add_argument("--text", default="And God said, Let there be light: and there was light")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    model = random_model() if args.checkpoint is None else load(args.checkpoint).eval()
    if not isinstance(model, RWKV6):
        raise ValueError(f"--checkpoint: expected RWKV-6, got RWKV-{model.version}")
    if args.layer >= model.n_layer:
        raise ValueError(f"--layer: expected 0 to {model.n_layer - 1}, got {args.layer}")
    tokens = tokenizer_of(model.vocab_size, args.tokenizer).encode(args.text)
    if not tokens:
        raise ValueError("--text: expected some text, got none")

    att, x = layer_input(model.double(), args.layer, tokens)
    p = {name: y.detach() for name, y in att.named_parameters()}
    mixed = [mix(x, p, stage) for stage in STAGES]
    rows = []
    for i, (stage, m) in enumerate(zip(STAGES, mixed, strict=True)):
        change = f"{relative(m.y, mixed[i - 1].y):.2f}" if i else ""
        check = f"{relative(m.y, m.direct):.0e}"
        rows.append((stage.name, stage.new, m.state, change, check))
    header = ("RWKV", "new", "state", "changes the output by", "off its attention form")
    report.table(header, rows)
    print(f"\nRWKV-6 off torch_rwkv6.nn.TimeMix: {relative(mixed[-1].y, att(x[None])[0][0]):.0e}")

    figure, panels = plt.subplots(1, 5, figsize=(15, 3.4))
    four, five, six = (mixed[i] for i in (0, 3, 5))
    for axes, name, m in zip(
        panels, ("4, a channel", "5.2, a head", "6, a head"), (four, five, six)
    ):
        weights = m.weights[len(m.weights) // 2]
        limit = weights.abs().quantile(0.99).item()
        axes.imshow(weights.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set(title=f"RWKV-{name}", xlabel="value of token s")
    panels[0].set(ylabel="in the output at t")
    for axes, name, m in zip(panels[3:], ("4 and 5.2", "6"), (five, six), strict=True):
        axes.plot(m.decay[:, :: max(1, m.decay.shape[1] // 6)].numpy())
        axes.set(title=f"RWKV-{name}: decays", xlabel="token", ylim=(0, 1.02))
    report.save(figure, args.out, "rwkv4_to_6")


if __name__ == "__main__":
    sys.exit(main())
