"""Data-parallel training in several processes (DDP over gloo), and the same run in one.

    pip install torch_rwkv6[examples]
    python examples/ddp.py                # two processes
    python examples/ddp.py --processes 1  # the single-process run alone

Each process reads its share of the lanes with its own states; Lightning averages the gradients. The
mean of equal shares is the mean of all, so the losses are those of one process that reads all
lanes, up to rounding. Lightning starts the other processes as fresh programs: a fork of a process
that has used several threads would hang.
"""

from __future__ import annotations

import os
import sys

import cli
import torch
from cli import positive
from corpus import read_text
from lightning.pytorch.strategies import DDPStrategy
from text_data import Lanes
from text_model import LaneModel, trainer, training_parser
from torch import Tensor
from torch.utils.data import DataLoader

from torch_rwkv6.nn import RWKV6


class SharedLaneModel(LaneModel):
    """Reads the lanes of this process, of a batch with those of all processes."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        tokens, targets = (x.chunk(processes)[rank] for x in batch)  # [B / processes, T]
        return super().training_step((tokens, targets), index)


def train(text: bytes, args, **options: object) -> list[float]:
    """The losses of all steps."""
    torch.manual_seed(args.seed)
    model = RWKV6(256, 2, 64, 32, lora_mix=8, lora_decay=8)
    module = SharedLaneModel(model, args.lr, args.steps)
    lanes = Lanes(text, args.batch_size, args.length, endless=True)
    # gradients are clipped after they have been averaged: the same in both runs
    trainer(args.steps, gradient_clip_val=1.0, **options).fit(
        module, DataLoader(lanes, batch_size=None)
    )
    return module.losses


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = training_parser(__doc__, lr=6e-3, steps=50)
    parser.add_argument("--processes", type=positive, default=2, help="on this machine")
    parser.add_argument("--length", type=positive, default=32, help="bytes of a lane in one step")
    args = parser.parse_args(argv)
    if args.batch_size % args.processes:
        raise ValueError(
            f"--batch-size: expected a multiple of --processes {args.processes}, "
            f"got {args.batch_size}"
        )
    text = read_text(args.data)
    # the processes that Lightning starts run this script from its first line
    first_process = os.environ.get("LOCAL_RANK", "0") == "0"
    single = train(text, args) if first_process else []
    if args.processes > 1:
        several = train(
            text, args, devices=args.processes, strategy=DDPStrategy(process_group_backend="gloo")
        )
    else:
        several = single
    if not first_process:
        return
    print(f"step: loss of one process, of {args.processes}")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 5)), args.steps - 1}):
        print(f"  {step}: {single[step]:.6f} {several[step]:.6f}")
    off = max(abs(a / b - 1) for a, b in zip(single, several, strict=True))
    print(f"largest relative difference: {off:.1e}")


if __name__ == "__main__":
    sys.exit(main())
