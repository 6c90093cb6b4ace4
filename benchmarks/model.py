"""A language model against rwkv and llama.cpp on the same weights: decoding, reading a prompt.

All take turns in one process. llama.cpp gets the weights as GGUF files (to_gguf.py) and is compared
in float32, bfloat16 and, against our int8, q8_0; the package rwkv in float32.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_rwkv6
from benchmarks import figure, llama
from benchmarks.report import Column, Report, Table, number, plural, times
from benchmarks.timing import cpu_clock, interleave, wall_clock
from benchmarks.to_gguf import write_gguf
from torch_rwkv6.models import load, save
from torch_rwkv6.nn import RWKV, RWKV6

VOCAB, LAYERS, WIDTH = 65536, 12, 768
TOKENS = 4  # decoded in one turn
CHECKED = 8  # tokens of the check
# Ours, what llama.cpp calls it, and how far logits may be from ours in float32
KINDS = {"fp32": ("F32", 1e-4), "bf16": ("BF16", 5e-2), "int8": ("Q8_0", 0.3)}


def peer(path: Path) -> Any:
    """The package rwkv as it comes, TorchScript on; None where it is not installed."""
    os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}  # read when it is imported
    try:
        import rwkv.model
    except ImportError:
        print("rwkv is not installed (pip install torch_rwkv6[text]): timed without it")
        return None
    return rwkv.model.RWKV(str(path), "cpu fp32", verbose=False)


def random_weights(vocab: int, layers: int, width: int) -> RWKV6:
    """Random weights as large as a trained model's, so that no value is zero or a denormal."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = RWKV6(vocab, layers, width)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and name.endswith(".weight") and "ln" not in name:
                p.normal_(std=p.shape[1] ** -0.5)
            elif name.endswith(("_w1", "_w2")):  # of the low ranks: decays stay moderate
                p.normal_(std=0.02)
            else:
                p.uniform_(0.1, 0.9)
    return model


@dataclass
class Contender:
    """A model that goes on from where its last call ended."""

    name: str
    kind: str  # of KINDS
    forward: Callable[[list[int]], Any]  # logits after the last of some tokens, [V]
    restart: Callable[[], None]  # begins a new sequence
    set_threads: Callable[[int], None]
    version: str

    @property
    def label(self) -> str:
        kind = KINDS[self.kind][0].lower() if self.name == "llama.cpp" else self.kind
        return f"{self.name}, {kind}"

    def decode(self) -> None:
        for _ in range(TOKENS):
            self.forward([17])

    def read(self, prompt: list[int]) -> None:
        self.restart()
        self.forward(prompt)


def of_ours(model: RWKV, kind: str) -> Contender:
    state = model.initial_state(1)

    def forward(tokens: list[int]) -> Tensor:
        return model.forward_(torch.tensor([tokens]), state)[0]

    def restart() -> None:
        for x in state:
            x.zero_()

    version = f"torch_rwkv6 {torch_rwkv6.__version__}"
    return Contender("torch_rwkv6", kind, forward, restart, torch.set_num_threads, version)


def of_rwkv(model: Any) -> Contender:
    state: Any = None

    def forward(tokens: list[int]) -> Tensor:
        nonlocal state
        logits, state = model.forward(tokens, state)
        return logits

    def restart() -> None:
        nonlocal state
        state = None

    return Contender("rwkv", "fp32", forward, restart, torch.set_num_threads, "rwkv")


def of_llama(llama_cpp: Any, model: RWKV6, kind: str, folder: Path) -> Contender:
    path = folder / f"{kind}.gguf"
    write_gguf(model, path, KINDS[kind][0])
    own = llama.Llama(llama_cpp, path)
    version = f"llama-cpp-python {llama_cpp.__version__}"
    return Contender("llama.cpp", kind, own.forward, own.restart, own.set_threads, version)


def check(contender: Contender, expected: Tensor) -> float:
    """The relative error of its logits.

    Raises:
        AssertionError: they are not ours, so that what is timed is not the same work.
    """
    contender.restart()
    found = torch.as_tensor(contender.forward(list(range(CHECKED)))).float()
    error = ((found - expected).norm() / expected.norm()).item()
    limit = KINDS[contender.kind][1]
    assert error < limit, f"{contender.label}: relative error {error:.1e}, expected below {limit}"
    return error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="the processor's time instead of the clock's, for one thread on a busy machine",
    )
    parser.add_argument("--prompt", type=int, default=512, help="its tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each (%(default)s)")


def run(args: argparse.Namespace) -> None:
    model = random_weights(VOCAB, LAYERS, WIDTH).requires_grad_(False)
    half = load(model.state_dict(), dtype=torch.bfloat16)
    ours = {"fp32": model, "bf16": half, "int8": load(half.state_dict(), dtype="int8")}
    read = {kind: bytes_read(own) for kind, own in ours.items()}
    contenders = [of_ours(own, kind) for kind, own in ours.items()]
    about = (
        f"A model of {LAYERS} layers, {WIDTH} wide, {VOCAB:,} tokens: tokens per second. Of ours, "
        "decoding a token reads "
        + ", ".join(f"{count / 1e6:.0f} MB in {kind}" for kind, count in read.items())
        + "."
    )
    report = Report("model", about)
    print(f"{report.machine}\n{about}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(model, folder / "model.pth")
        if (other := peer(folder / "model.pth")) is not None:
            contenders.append(of_rwkv(other))
        if (llama_cpp := llama.find(args.rivals)) is not None:
            contenders += [of_llama(llama_cpp, model, kind, folder) for kind in KINDS]
        expected = model.forward_(torch.arange(CHECKED)[None], model.initial_state(1))[0].clone()
        errors = {c.label: check(c, expected) for c in contenders}
        for threads in args.threads:
            for contender in contenders:
                contender.set_threads(threads)
            report.add(_race(args, [], contenders, read, errors, threads))
            prompt = torch.randint(VOCAB, (args.prompt,)).tolist()
            report.add(_race(args, prompt, contenders, read, errors, threads))
    figure.bars(report, args.out, "ms", "ms a token")
    report.save(args.out)


def bytes_read(model: RWKV) -> int:
    """What decoding a token reads: all weights but the embedding's."""
    weights = [*model.parameters(), *model.buffers()]
    return sum(x.nbytes for x in weights) - model.emb.weight.nbytes


def _race(
    args: argparse.Namespace,
    prompt: list[int],
    contenders: list[Contender],
    read: dict[str, int],
    errors: dict[str, float],
    threads: int,
) -> Table:
    """All contenders read the prompt in one call, or, where it is empty, decode."""
    decodes = not prompt
    calls: dict[str, Callable[[], object]] = {
        c.label: c.decode if decodes else (lambda c=c: c.read(prompt)) for c in contenders
    }
    weight, x = torch.randn(VOCAB, WIDTH), torch.randn(1, WIDTH)
    if decodes:  # the speed at which the largest weight can be read from memory
        calls["sum"], calls["product"] = weight.sum, lambda: torch.ops.rwkv6.matvec(x, weight)
    clock = cpu_clock if args.cpu_time else wall_clock
    seconds = interleave(calls, args.rounds if decodes else max(1, args.rounds // 4), clock)
    rows: list[dict[str, Any]] = []
    for c in contenders:
        least, median = (s / (len(prompt) or TOKENS) for s in seconds[c.label])
        row = {"contender": c.label, "version": c.version, "threads": threads, "ms": least * 1e3}
        row |= {"best": 1 / least, "median": 1 / median, "error": errors[c.label]}
        if c.name == "torch_rwkv6":
            for key, rival in (("rwkv", "rwkv, fp32"), ("llama", _rival(c.kind))):
                if rival in seconds:
                    row[key] = seconds[rival][0] / seconds[c.label][0]
            if decodes:
                row["gb_per_s"] = read[c.kind] / least / 1e9
        rows.append(row)
    if decodes:
        speed = weight.nbytes / min(seconds["sum"][0], seconds["product"][0]) / 1e9
        rows.append({"contender": "reading the head's weight alone", "gb_per_s": speed})
    columns = (
        Column("contender", "", left=True),
        Column("best", "tokens/s best", number),
        Column("median", "median", number),
        Column("rwkv", "to rwkv", times),
        Column("llama", "to llama.cpp", times),
        Column("gb_per_s", "GB/s", number),
        Column("error", "error", "{:.0e}".format),
    )
    time = ", processor time" if args.cpu_time else ""
    what = "decoding" if decodes else f"a prompt of {len(prompt)}"
    return Table(f"{what}, {plural(threads, 'thread')}{time}", columns, rows)


def _rival(kind: str) -> str:
    return f"llama.cpp, {KINDS[kind][0].lower()}"
