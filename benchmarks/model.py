"""A language model against the package rwkv on the same weights: decoding and reading a prompt."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import interleave, machine_line
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
    """Of a trained model's sizes in every layer, so that nothing is zero or a denormal."""
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        save(model, path)
        other = peer(path)
    if other is not None:
        check(model, other)
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    read -= model.emb.weight.numel() * model.emb.weight.element_size()
    prompt = torch.randint(VOCAB, (1, PROMPT))
    print(
        f"{LAYERS} layers, {WIDTH} wide, {VOCAB} tokens: {read / 1e6:.0f} MB read a token in fp32"
    )
    print(f"{'tokens per second':40} {'best':>8} {'median':>8} {'to rwkv':>8}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        decoding = {"fp32": decoder(model), "bf16": decoder(half)}
        reading: dict[str, Callable[[], object]] = {
            "fp32": lambda: model.forward_(prompt, model.initial_state(1)),
        }
        if other is not None:
            decoding["rwkv, fp32"] = peer_decoder(other)
            reading["rwkv, fp32"] = lambda: other.forward(prompt[0].tolist(), None)
        # what reading the weights alone would allow: the head's, summed
        decoding["a sum over the head"] = lambda: model.head.weight.sum()
        for work, contenders, rounds, count in (
            ("decoding", decoding, 12, TOKENS),
            (f"a prompt of {PROMPT}", reading, 2, PROMPT),
        ):
            seconds = interleave(contenders, rounds)
            if work == "decoding":
                best, _ = seconds.pop("a sum over the head")
                speed = model.head.weight.numel() * 4 / best
                limit, least = speed / 1e9, seconds["fp32"][0] / TOKENS
                print(
                    f"  {threads} threads: weights are read at {read / least / 1e9:.1f} GB/s, "
                    f"torch.sum reads at {limit:.1f} GB/s"
                )
            for name, (least, median) in seconds.items():
                to = ""
                if other is not None:
                    to = f"{seconds['rwkv, fp32'][0] / least:7.2f}x"
                label = f"{work}, {threads} threads, {name}"
                print(f"{label:40} {count / least:8.1f} {count / median:8.1f} {to:>8}")
