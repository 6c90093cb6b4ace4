"""RWKV-4 in NumPy, one token at a time: the article's decoder, done right.

    python examples/article/rwkv4_numpy.py RWKV-4-Pile-430M-20220808-8066.pth \\
        --tokenizer 20B_tokenizer.json --prompt "In a shocking finding,"
    python examples/article/rwkv4_numpy.py runs/article/rwkv4.pth   # from compare_mixers.py: bytes

Any official RWKV-4 checkpoint (github.com/BlinkDL/RWKV-LM) works; sizes are read from shapes.
Between two tokens the model keeps 4 vectors of n_embd numbers per layer, whatever the length of
the text. The article's are (x, num, den) of the time mixing and x of the channel mixing, and its
num and den overflow when exp(k) does. Here they are the average num / den and log(den): the same
information in the same room, and nothing that is exponentiated is ever above 0.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import report
import torch  # only to read the file
from corpus import tokenizer_of
from numpy.typing import NDArray
from report import cli, plt

Array = NDArray[np.float32]
Weights = Mapping[str, Array]

ROWS = ("att x", "att average", "att log(den)", "ffn x")  # of a layer's state


def load(path: str) -> dict[str, Array]:
    """The weights as float32, vectors flat.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no RWKV-4.
    """
    with Path(path).open("rb"):  # torch.load's message of a missing file has no name
        pass
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: x.float().squeeze().numpy() for name, x in tensors.items()}
    except Exception as error:  # whatever the unpickler or unzipper met
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no PyTorch checkpoint of weights: {reason}") from error
    layers = 1 + max((int(n.split(".")[1]) for n in weights if n.startswith("blocks.")), default=0)
    for name in expected_names(layers):
        if name not in weights:
            raise ValueError(f"{path} is no RWKV-4: it has no {name}")
    if "blocks.0.att.ln_x.weight" in weights:
        raise ValueError(f"{path} is no RWKV-4: it has blocks.0.att.ln_x.weight, as RWKV-5 has")
    return weights


def expected_names(layers: int) -> Iterator[str]:
    yield "emb.weight"
    yield from (f"blocks.0.ln0.{x}" for x in ("weight", "bias"))
    for i in range(layers):
        yield from (f"blocks.{i}.{ln}.{x}" for ln in ("ln1", "ln2") for x in ("weight", "bias"))
        yield from (f"blocks.{i}.att.time_{x}" for x in ("decay", "first"))
        yield from (f"blocks.{i}.att.time_mix_{x}" for x in "kvr")
        yield from (f"blocks.{i}.ffn.time_mix_{x}" for x in "kr")
        for x in ("att.key", "att.value", "att.receptance", "att.output"):
            yield f"blocks.{i}.{x}.weight"
        for x in ("ffn.key", "ffn.value", "ffn.receptance"):
            yield f"blocks.{i}.{x}.weight"
    yield from ("ln_out.weight", "ln_out.bias", "head.weight")


def initial_state(weights: Weights) -> Array:  # [L, 4, D]
    layers = sum(name.endswith("att.time_first") for name in weights)
    state = np.zeros((layers, len(ROWS), weights["emb.weight"].shape[1]), np.float32)
    state[:, ROWS.index("att log(den)")] = -np.inf  # nothing has been seen
    return state


def step(weights: Weights, token: int, state: Array) -> tuple[Array, Array]:
    """Logits after one more token, [V], and the next state, [L, 4, D]; ``state`` stays as it is."""
    state = state.copy()
    x = layer_norm(weights["emb.weight"][token], weights, "blocks.0.ln0")
    for i, (att_x, average, log_den, ffn_x) in enumerate(state):  # views: written below
        now = layer_norm(x, weights, f"blocks.{i}.ln1")
        y, average[:], log_den[:] = time_mix(
            now, att_x, average, log_den, weights, f"blocks.{i}.att"
        )
        x, att_x[:] = x + y, now
        now = layer_norm(x, weights, f"blocks.{i}.ln2")
        x, ffn_x[:] = x + channel_mix(now, ffn_x, weights, f"blocks.{i}.ffn"), now
    return weights["head.weight"] @ layer_norm(x, weights, "ln_out"), state


def time_mix(
    x: Array, last: Array, average: Array, log_den: Array, p: Weights, att: str
) -> tuple[Array, Array, Array]:
    """All [D]: the output, and average and log_den with this token. Peng et al., arXiv:2305.13048.

    ``x`` and ``last`` are the normed inputs of this token and of the one before.
    """
    k = p[f"{att}.key.weight"] @ shifted(x, last, p[f"{att}.time_mix_k"])
    v = p[f"{att}.value.weight"] @ shifted(x, last, p[f"{att}.time_mix_v"])
    r = p[f"{att}.receptance.weight"] @ shifted(x, last, p[f"{att}.time_mix_r"])
    # the output counts this token with the bonus u; the state without, and the others decayed
    wkv, _ = include(average, log_den, v, p[f"{att}.time_first"] + k)
    average, log_den = include(average, log_den - np.exp(p[f"{att}.time_decay"]), v, k)
    return p[f"{att}.output.weight"] @ (sigmoid(r) * wkv), average, log_den


def include(average: Array, log_den: Array, value: Array, k: Array) -> tuple[Array, Array]:
    """An average of weight exp(log_den) after one more value of weight exp(k), and its log_den."""
    total = np.logaddexp(log_den, k)
    return average + np.exp(k - total) * (value - average), total


def channel_mix(x: Array, last: Array, p: Weights, ffn: str) -> Array:  # [D], [D] -> [D]
    k = p[f"{ffn}.key.weight"] @ shifted(x, last, p[f"{ffn}.time_mix_k"])
    r = p[f"{ffn}.receptance.weight"] @ shifted(x, last, p[f"{ffn}.time_mix_r"])
    return sigmoid(r) * (p[f"{ffn}.value.weight"] @ np.maximum(k, 0) ** 2)


def shifted(x: Array, last: Array, mix: Array) -> Array:
    return x * mix + last * (1 - mix)


def layer_norm(x: Array, p: Weights, name: str) -> Array:
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)  # the article leaves out the epsilon
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def sample(logits: Array, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """One token of the nucleus: the likeliest ones until together they have top_p."""
    if temperature == 0:
        return int(logits.argmax())
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before > top_p]] = 0  # the likeliest has nothing before it and stays
    p **= 1 / temperature
    return int(random.choice(len(p), p=p / p.sum()))


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("checkpoint", help="an RWKV-4 .pth")
    parser.add_argument("--tokenizer", help=cli.TOKENIZER)
    parser.add_argument("--prompt", default="In the beginning ", help="to go on from")
    parser.add_argument("--length", type=cli.positive, default=200, help="tokens to write")
    parser.add_argument(
        "--temperature", type=cli.number(least=0), default=1.0, help="0 takes the likeliest"
    )
    parser.add_argument(
        "--top-p", type=cli.share, default=0.85, help="share of the likeliest tokens"
    )
    args = parser.parse_args(argv)
    weights = load(args.checkpoint)
    tokenizer = tokenizer_of(len(weights["head.weight"]), args.tokenizer)
    prompt = tokenizer.encode(args.prompt)
    if not prompt:
        raise ValueError("--prompt must not be empty")

    random, text = np.random.default_rng(args.seed), tokenizer.stream()
    state, states = initial_state(weights), []
    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    for token in prompt:
        logits, state = step(weights, token, state)
        states.append(state)
    for _ in range(args.length):
        token = sample(logits, args.temperature, args.top_p, random)
        print(text.push(token), end="", flush=True)
        logits, state = step(weights, token, state)
        states.append(state)
    rate = len(states) / (time.perf_counter() - start)

    layers, rows, width = state.shape
    print("\n")
    header = ("layers", "width", "vocabulary", "numbers of state", "KiB", "tokens/s")
    size = f"{layers} x {rows} x {width} = {state.size}"
    kib = f"{state.nbytes / 1024:.1f}"
    report.table(header, [(layers, width, len(weights["head.weight"]), size, kib, f"{rate:.0f}")])

    figure, panels = plt.subplots(1, rows, figsize=(13, 3.4))
    history = np.stack(states, 1)[0, :, :, :64]  # [T, 4, up to 64 channels]
    for axes, name, values in zip(panels, ROWS, history.transpose(1, 2, 0), strict=True):
        limit = np.quantile(np.abs(values), 0.99)
        picture = axes.imshow(values, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit)
        axes.axvline(len(prompt) - 0.5, color="black", linewidth=0.8)
        axes.set(title=name, xlabel="token (line: end of the prompt)")
        figure.colorbar(picture)
    panels[0].set(ylabel="channel")
    figure.suptitle(
        "the state of the first layer (up to 64 channels): all that is kept of the text"
    )
    report.save(figure, args.out, "rwkv4_numpy")


if __name__ == "__main__":
    sys.exit(main())
