"""A training step of a whole model: where its time goes, and against attention over the length.

RWKV-6 and a Llama of as many parameters (transformers' own, with torch's causal
scaled_dot_product_attention), both with cross entropy over all tokens and the same AdamW, on one
sequence. --short leaves out torch.compile, which takes minutes.
"""

from __future__ import annotations

import argparse
import gc
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import torch_rwkv6
from benchmarks import figure, memory
from benchmarks.model import LAYERS, VOCAB, WIDTH, random_weights
from benchmarks.report import Column, Report, Table, number, plural, times
from benchmarks.timing import wall_clock

TOKENS = 512  # of the step that is taken apart
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
WARM_TOKENS, QUICK = 9, 10.0  # seconds: a quick step is timed twice
MOST_STEPS, MEASURED_TOKENS = 3, 2048  # of a length: as many steps as make so many tokens
SHORT = {"layers": 2, "width": 64, "vocab": 1024, "tokens": 64, "lengths": (64, 256)}
HEAD_SIZE = 64
DTYPES = ("float32", "bf16 autocast")
MODES = {"eager": "force_eager", "compiled": "default"}  # of torch.compiler.set_stance
LEAST_SHARE = 0.01  # an operator below it is not listed
RWKV, LLAMA = "RWKV-6", "Llama"

# The kinds of work in a step. What is none of the operators below is told apart by what it runs in.
PRODUCTS, FORWARD, BACKWARD = "matrix products", "WKV6 forward", "WKV6 backward"
ELEMENTWISE, LOSS, OPTIMISER = "elementwise and norms", "loss", "AdamW"
REST, UNKNOWN = "copies and rest", "unknown operators"
KINDS = (PRODUCTS, FORWARD, BACKWARD, ELEMENTWISE, LOSS, OPTIMISER, REST, UNKNOWN)
OPERATORS = {
    PRODUCTS: "addmm baddbmm bmm linear matmul mm",
    ELEMENTWISE: """
        add add_ addcmul addcmul_ clamp_min div exp group_norm layer_norm mul mul_
        native_group_norm native_group_norm_backward native_layer_norm native_layer_norm_backward
        neg pow relu sigmoid sigmoid_backward silu silu_backward square sub sum tanh tanh_backward
        threshold_backward
        """,
    LOSS: """
        _log_softmax _log_softmax_backward_data cross_entropy_loss log_softmax nll_loss
        nll_loss_backward nll_loss_forward nll_loss_nd
        """,
    REST: """
        _local_scalar_dense _reshape_alias _to_copy _unsafe_view alias as_strided cat clone
        contiguous copy_ detach detach_ embedding embedding_backward embedding_dense_backward empty
        empty_like empty_strided expand expand_as fill_ flatten index_select item narrow new_empty
        new_empty_strided new_zeros ones_like permute promote_types reshape resize_ resolve_conj
        resolve_neg result_type select select_backward slice slice_backward split squeeze stack t to
        transpose unbind unflatten unsqueeze view view_as zero_ zeros zeros_like
        """,
}
KIND_OF = {f"aten::{name}": kind for kind, names in OPERATORS.items() for name in names.split()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, help=f"of both models ({LAYERS})")
    parser.add_argument("--width", type=int, help=f"of both, a multiple of {HEAD_SIZE} ({WIDTH})")
    parser.add_argument("--vocab", type=int, help=f"tokens of the vocabulary ({VOCAB})")
    parser.add_argument("--tokens", type=int, help=f"of the step that is taken apart ({TOKENS})")
    parser.add_argument(
        "--compiled-longest", type=int, default=4096, help="T of the compiled models (%(default)s)"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", help=f"of the comparison ({' '.join(map(str, LENGTHS))})"
    )


@dataclass
class Trainee:
    """A model with its optimiser."""

    label: str
    model: nn.Module
    logits: Callable[[Tensor], Tensor]  # of tokens, [B, T] -> [B, T, V]
    blocks: Sequence[nn.Module]
    version: str
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        for block in self.blocks:  # which takes a fraction of the time for all at once
            block.compile(dynamic=True)

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def step(self, tokens: Tensor, dtype: str = "float32") -> None:  # of DTYPES
        """Learns from the tokens, [B, T + 1], once: each predicts the next."""
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
            loss = nn.functional.cross_entropy(  # the logits have no name that would keep them
                self.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
            )
        loss.backward()
        with record_function(OPTIMISER):
            self.optimiser.step()
            self.optimiser.zero_grad()


def of_ours(vocab: int, layers: int, width: int) -> Trainee:
    model = random_weights(vocab, layers, width)
    version = f"torch_rwkv6 {torch_rwkv6.__version__}"
    return Trainee(RWKV, model, lambda tokens: model(tokens)[0], model.blocks, version)


def of_llama(parameters: int, vocab: int, layers: int, width: int) -> Trainee | None:
    """With so many parameters, by the width of its MLP; None without transformers."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed (pip install transformers): measured without Llama")
        return None

    def config(inner: int) -> Any:
        return transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_SIZE,
            attn_implementation="sdpa",
            use_cache=False,
        )

    def size(inner: int) -> int:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config(inner))
        return sum(p.numel() for p in model.parameters())

    missing = parameters - size(width)
    inner = width + round(missing / (size(width + 1) - size(width)) / 8) * 8
    model = transformers.LlamaForCausalLM(config(inner))
    version = f"transformers {transformers.__version__}"
    return Trainee(LLAMA, model, lambda tokens: model(tokens).logits, model.model.layers, version)


def run(args: argparse.Namespace) -> None:
    def given(name: str, default: Any) -> Any:
        return getattr(args, name) or (SHORT[name] if args.short else default)

    vocab, layers, width = given("vocab", VOCAB), given("layers", LAYERS), given("width", WIDTH)
    torch.set_num_threads(args.threads[-1])
    threads = plural(args.threads[-1], "thread")
    torch.manual_seed(0)
    modes = ("eager",) if args.short else ("eager", "compiled")
    lengths = sorted(given("lengths", LENGTHS))
    longest = {"eager": lengths[-1], "compiled": args.compiled_longest}

    def growth(trainee: Trainee) -> dict[str, list[dict[str, Any]]]:
        return {
            mode: _growth(trainee, vocab, [T for T in lengths if longest[mode] >= T], mode)
            for mode in modes
            if longest[mode] >= lengths[0]
        }

    # One model after the other, since both would not leave enough memory for the longest steps.
    trainee = of_ours(vocab, layers, width)
    about = f"Training steps of RWKV-6 ({trainee.size / 1e6:.2f} million parameters)"
    tokens = torch.randint(vocab, (1, given("tokens", TOKENS) + 1))
    what = f"a step of {tokens.shape[1] - 1} tokens, {threads}"
    report = Report("train", about)
    taken = {
        f"{mode}, {dtype}": take_apart(trainee, tokens, dtype, mode)
        for mode in modes
        for dtype in DTYPES
    }
    rows = [{"contender": label, **row} for label, (row, _) in taken.items()]
    report.add(Table(what, SHARE_COLUMNS, rows))
    first = next(iter(taken))
    report.add(Table(f"operators of {what}, {first}", OPERATOR_COLUMNS, taken[first][1]))
    grown, size = [growth(trainee)], trainee.size
    del trainee
    gc.collect()  # compiled modules are cycles
    llama = of_llama(size, vocab, layers, width)
    if llama is not None:
        report.about += f" and Llama ({llama.size / 1e6:.2f} million parameters)"
        grown.append(growth(llama))
    report.about += (
        f": {layers} layers, {width} wide, {vocab:,} tokens, one sequence; forward, cross entropy, "
        "backward, AdamW."
    )

    growths = {}
    for mode in grown[0]:
        growths[mode] = rows = [
            {k: v for row in same for k, v in row.items()}
            for same in zip(*(g[mode] for g in grown), strict=True)
        ]
        for row in rows:
            if RWKV in row and LLAMA in row:
                row["ratio"] = row[RWKV] / row[LLAMA]
        report.add(Table(f"{mode}, float32, {threads}: T", GROWTH_COLUMNS, rows))
        report.about += crossing(rows, mode)
    print(f"\n{report.about}")
    figure.panels(_panels(growths), args.out / "train.png")
    report.save(args.out)


def take_apart(
    trainee: Trainee, tokens: Tensor, dtype: str, mode: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The time of a step and the share of each kind of work in it; and its operators.

    After a short step to warm up, one is timed, or two where that is quick, and another profiled.
    """

    def step() -> None:
        trainee.step(tokens, dtype)

    with torch.compiler.set_stance(MODES[mode]):
        trainee.step(tokens[:, :WARM_TOKENS], dtype)
        seconds = wall_clock(step)
        if seconds < QUICK:
            seconds = min(seconds, wall_clock(step))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
    spent: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for event in profiler.events():
        key = event.name, kind_of(event, mode)
        spent[key] += event.self_cpu_time_total
        calls[key] += 1
    total = sum(spent.values())
    shares: dict[str, float | None] = dict.fromkeys(KINDS)
    for (_, kind), used in spent.items():
        shares[kind] = (shares[kind] or 0) + used / total
    speed = (tokens.shape[1] - 1) / seconds
    row = {"ms": seconds * 1e3, "speed": speed, "version": trainee.version, **shares}
    operators = [
        {
            "operator": name,
            "kind": kind,
            "calls": calls[name, kind],
            "ms": used / 1e3,
            "share": used / total,
        }
        for (name, kind), used in spent.most_common()
        if used >= LEAST_SHARE * total
    ]
    return row, operators


def kind_of(event: Any, mode: str) -> str:
    """The kind of an event of torch.profiler, by its name and the events around it."""
    around = event
    while around is not None:
        if around.name == OPTIMISER:
            return OPTIMISER
        if around.name.startswith("rwkv6::"):
            return BACKWARD if "backward" in around.name else FORWARD
        around = around.cpu_parent
    if re.fullmatch(r"\w+::\w+", event.name):  # a registered operator
        return KIND_OF.get(event.name, UNKNOWN)
    # Compiled loops are no operators: their time is that of the regions that they are compiled in.
    return ELEMENTWISE if mode == "compiled" else REST


def percent(share: float) -> str:
    return f"{share:.1%}"


SHARE_COLUMNS = (
    Column("contender", "", left=True),
    Column("ms", "ms", number),
    Column("speed", "tokens/s", number),
    *(Column(kind, kind, percent) for kind in KINDS),
)
OPERATOR_COLUMNS = (
    Column("operator", "", left=True),
    Column("kind", "kind", left=True),
    Column("calls", "calls"),
    Column("ms", "ms", number),
    Column("share", "share", percent),
)


GROWTH_COLUMNS = (
    Column("T", "T"),
    *(Column(label, f"{label}, tokens/s", number) for label in (RWKV, LLAMA)),
    Column("ratio", f"{RWKV} to {LLAMA}", times),
    *(Column(f"{label}, GB", f"{label}, GB", number) for label in (RWKV, LLAMA)),
    Column("steps", "steps measured"),
)


def _growth(
    trainee: Trainee, vocab: int, lengths: Sequence[int], mode: str
) -> list[dict[str, Any]]:
    """The best speed of steps on ever longer sequences, and their memory, as far as there is."""
    rows: list[dict[str, Any]] = []
    with torch.compiler.set_stance(MODES[mode]):
        trainee.step(torch.randint(vocab, (1, WARM_TOKENS)))
        for length in lengths:
            steps = max(1, min(MOST_STEPS, MEASURED_TOKENS // length))
            row: dict[str, Any] = {"T": length, "steps": steps, "version": trainee.version}
            if not rows or fits(rows[-1].get(f"{trainee.label}, GB"), rows[-1]["T"], length):
                tokens = torch.randint(vocab, (1, length + 1))
                for _ in range(steps):
                    seconds, row[f"{trainee.label}, GB"] = _measure(trainee, tokens)
                    row[trainee.label] = max(length / seconds, row.get(trainee.label, 0))
                print(f"{trainee.label}, {mode}, T = {length}", flush=True)
            else:
                print(f"{trainee.label}, {mode}, T = {length}: not enough memory", flush=True)
            rows.append(row)
    return rows


def fits(gigabytes: float | None, shorter: int, length: int) -> bool:
    """Whether there is memory for a step of a length, if it grows as from the shorter one's."""
    memory.give_back()
    available = memory.available()
    if gigabytes is None or available is None:
        return True
    return gigabytes * 1e9 * length / shorter < available


def _measure(trainee: Trainee, tokens: Tensor) -> tuple[float, float | None]:
    """Seconds of a step, and the GB that it needs beyond parameters and optimiser."""
    memory.give_back()
    base = memory.reset_peak()
    seconds = wall_clock(lambda: trainee.step(tokens))
    most = memory.peak()
    return seconds, None if base is None or most is None else (most - base) / 1e9


def crossing(rows: list[dict[str, Any]], mode: str) -> str:
    """A sentence that says from which length on RWKV-6 is the faster of the two."""
    compared = [row for row in rows if "ratio" in row]
    slower = [row["T"] for row in compared if row["ratio"] < 1]
    faster = [row["T"] for row in compared if row["T"] > max(slower, default=0)]
    if faster:
        return f" {RWKV}, {mode}, is the faster from T = {min(faster):,} on."
    return f" {RWKV}, {mode}, is slower up to T = {max(slower):,}." if slower else ""


def _panels(growths: dict[str, list[dict[str, Any]]]) -> list[figure.Panel]:
    """Tokens per second of each mode, then the memory of the first."""

    def panel(title: str, rows: list[dict[str, Any]], key: str) -> figure.Panel:
        lines = {}
        for label in (RWKV, LLAMA):
            shown = [row for row in rows if row.get(key.format(label)) is not None]
            lines[label] = [row["T"] for row in shown], [row[key.format(label)] for row in shown]
        return figure.Panel(title, lines, logarithmic=True)

    drawn = [panel(f"tokens/s over T, {mode}", rows, "{}") for mode, rows in growths.items()]
    mode, rows = next(iter(growths.items()))
    return [*drawn, panel(f"GB of a step over T, {mode}", rows, "{}, GB")]
