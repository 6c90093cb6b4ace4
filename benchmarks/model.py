"""A language model against the package rwkv on the same weights: decoding and reading a prompt."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine_line
from benchmarks.timing import interleave
from torch_rwkv6.models import load, save
from torch_rwkv6.nn import RWKV, RWKV6

VOCAB, LAYERS, WIDTH = 65536, 12, 768
PROMPT, TOKENS = 512, 4  # tokens of the prompt; tokens decoded in one turn


def peer(path: Path) -> Any:
    """The package rwkv as it comes, TorchScript on; None where it is not installed."""
    os.environ |= {"RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}  # read when it is imported
    try:
        import rwkv.model
    except ImportError:
        print("rwkv is not installed (pip install torch_rwkv6[text]): timed without it")
        return None
    return rwkv.model.RWKV(str(path), "cpu fp32", verbose=False)


def random_weights() -> RWKV6:
    """Random weights as large as a trained model's, so that no value is zero or a denormal."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = RWKV6(VOCAB, LAYERS, WIDTH)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and name.endswith(".weight") and "ln" not in name:
                p.normal_(std=p.shape[1] ** -0.5)
            else:
                p.uniform_(0.1, 0.9)
    return model


def decoder(model: RWKV) -> Callable[[], torch.Tensor]:
    state, token = model.initial_state(1), torch.tensor([[17]])

    def run() -> torch.Tensor:
        for _ in range(TOKENS):
            logits = model.forward_(token, state)
        return logits

    return run


def peer_decoder(model: Any) -> Callable[[], None]:
    state: Any = None

    def run() -> None:
        nonlocal state
        for _ in range(TOKENS):
            _, state = model.forward([17], state)

    return run


def check(ours: RWKV, other: Any) -> None:
    """Both give the same logits: what is timed is the same work."""
    expected, _ = other.forward(list(range(8)), None)
    found = ours.forward_(torch.arange(8)[None], ours.initial_state(1))[0]
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 1e-4, f"relative error {error:.1e}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beyond the common options."""


def run(args: argparse.Namespace) -> None:
    print(machine_line())
    model = random_weights().requires_grad_(False)
    half = load(model.state_dict(), dtype=torch.bfloat16)
    int8 = load(half.state_dict(), dtype="int8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        save(model, path)
        other = peer(path)
    if other is not None:
        check(model, other)
    print(
        f"{LAYERS} layers, {WIDTH} wide, {VOCAB} tokens: {bytes_read(model) / 1e6:.0f} MB read a "
        "token in fp32\n"
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        title = f"{threads} thread" + "s" * (threads > 1)
        print(f"| {title}, tokens per second | best | median | to rwkv | GB/s |")
        print("|---|---:|---:|---:|---:|")
        race_decoding({"fp32": model, "bf16": half, "int8": int8}, other)
        race_reading(model, other)
        print()


def bytes_read(model: RWKV) -> int:
    """What decoding a token reads: all weights but the embedding's."""
    weights = [*model.parameters(), *model.buffers()]
    return sum(x.nbytes for x in weights) - model.emb.weight.nbytes


def race_decoding(models: Mapping[str, RWKV], other: Any) -> None:
    """Decoding, and its limit: the speed at which the largest weight can be read from memory."""
    head, x = models["fp32"].head.weight, torch.randn(1, WIDTH)
    contenders: dict[str, Callable[[], object]] = {
        f"decoding, {name}": decoder(model) for name, model in models.items()
    }
    read = {f"decoding, {name}": bytes_read(model) for name, model in models.items()}
    if other is not None:
        contenders["decoding, rwkv, fp32"] = peer_decoder(other)
        read["decoding, rwkv, fp32"] = read["decoding, fp32"]
    contenders["sum"] = head.sum
    contenders["product"] = lambda: torch.ops.rwkv6.matvec(x, head)
    seconds = interleave(contenders, 8)
    limit = head.nbytes / min(seconds.pop("sum")[0], seconds.pop("product")[0])
    for name, (least, median) in seconds.items():
        speed = TOKENS * read[name] / least / 1e9
        report(name, TOKENS, least, median, seconds, "decoding, rwkv, fp32", f"{speed:.1f}")
    print(f"| reading the head's weight alone | | | | {limit / 1e9:.1f} |")


def race_reading(model: RWKV, other: Any) -> None:
    """A prompt, all its tokens in one call."""
    prompt = torch.randint(VOCAB, (1, PROMPT))
    contenders: dict[str, Callable[[], object]] = {
        f"a prompt of {PROMPT}, fp32": lambda: model.forward_(prompt, model.initial_state(1)),
    }
    peer_name = f"a prompt of {PROMPT}, rwkv, fp32"
    if other is not None:
        contenders[peer_name] = lambda: other.forward(prompt[0].tolist(), None)
    seconds = interleave(contenders, 2)
    for name, (least, median) in seconds.items():
        report(name, PROMPT, least, median, seconds, peer_name, "")


def report(
    name: str,
    tokens: int,
    least: float,
    median: float,
    seconds: Mapping[str, tuple[float, float]],
    peer_name: str,
    speed: str,
) -> None:
    """One row: tokens per second of the fastest turn and of the middle one."""
    to = f"{seconds[peer_name][0] / least:.2f}x" if peer_name in seconds else ""
    print(f"| {name} | {tokens / least:.1f} | {tokens / median:.1f} | {to} | {speed} |", flush=True)
