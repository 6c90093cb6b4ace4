"""Training in several processes by Lightning's strategies (over gloo), and the same run in one.

    pip install torch_rwkv6[examples]
    python examples/strategies.py                                   # two processes
    python examples/strategies.py --processes 4                     # two by two: FSDP2 x TP
    python examples/strategies.py --processes 1                     # the single-process run alone

Under DDP each process has the whole model and reads its share of the lanes with its own states;
Lightning averages the gradients. ModelParallelStrategy has `torch_rwkv6.parallel.parallelize` share
the layers among the processes of a group (tensor parallel), which read the same lanes, and the
parameters among the groups (FSDP2). The mean of equal shares is the mean of all, so the losses are
those of one process that reads all lanes, up to rounding. Lightning starts the other processes as
fresh programs: a fork of a process that has used several threads would hang.
"""

from __future__ import annotations

import os
import sys

import cli
import torch
from cli import positive
from corpus import read_text
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from text_data import Lanes
from text_model import LaneModel, trainer, training_parser
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from torch_rwkv6.nn import RWKV6
from torch_rwkv6.parallel import parallelize


class SharedLaneModel(LaneModel):
    """Reads the lanes of this process, of a batch with those of all processes."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # data_parallel x tensor_parallel
            sizes, names = tuple(self.device_mesh.shape), ("dp_shard", "tp")
            mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
            parallelize(self.model, mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        rank, shares = self.trainer.global_rank, self.trainer.world_size
        if self.device_mesh is not None:  # processes of tensor_parallel read the same lanes
            data = self.device_mesh["data_parallel"]
            rank, shares = data.get_local_rank(), data.size()
        tokens, targets = (x.chunk(shares)[rank] for x in batch)  # [B / shares, T]
        return super().training_step((tokens, targets), index)


def train(text: bytes, args, **options: object) -> list[float]:
    """The losses of all steps."""
    torch.manual_seed(args.seed)
    model = RWKV6(256, 2, 64, 32, lora_mix=8, lora_decay=8)
    module = SharedLaneModel(model, args.lr, args.steps)
    lanes = Lanes(text, args.batch_size, args.length, endless=True)
    # gradients are clipped after they have been averaged: the same in all runs
    trainer(args.steps, gradient_clip_val=1.0, **options).fit(
        module, DataLoader(lanes, batch_size=None)
    )
    return module.losses


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = training_parser(__doc__, lr=6e-3, steps=50)
    parser.add_argument("--processes", type=positive, default=2, help="on this machine")
    parser.add_argument(
        "--tensor-parallel", type=positive, default=2, help="processes that share every layer"
    )
    parser.add_argument("--length", type=positive, default=32, help="bytes of a lane in one step")
    args = parser.parse_args(argv)
    if args.batch_size % args.processes:
        raise ValueError(
            f"--batch-size: expected a multiple of --processes {args.processes}, "
            f"got {args.batch_size}"
        )
    if args.processes > 1 and args.processes % args.tensor_parallel:
        raise ValueError(
            f"--tensor-parallel: expected a divisor of --processes {args.processes}, "
            f"got {args.tensor_parallel}"
        )
    text = read_text(args.data)
    strategies = {
        "DDP": lambda: DDPStrategy(process_group_backend="gloo"),
        "FSDP2 x TP": lambda: ModelParallelStrategy(
            args.processes // args.tensor_parallel,
            args.tensor_parallel,
            process_group_backend="gloo",
        ),
    }
    # the processes that Lightning starts run this script from its first line
    first_process = os.environ.get("LOCAL_RANK", "0") == "0"
    losses = {"one process": train(text, args)} if first_process else {}
    if args.processes > 1:
        for name, strategy in strategies.items():
            losses[name] = train(text, args, devices=args.processes, strategy=strategy())
    if not first_process:
        return
    print(f"step: loss of {', '.join(losses)}")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 5)), args.steps - 1}):
        print(f"  {step}: {' '.join(f'{x[step]:.6f}' for x in losses.values())}")
    for name, several in losses.items():
        off = max(abs(a / b - 1) for a, b in zip(losses["one process"], several, strict=True))
        print(f"{name}: largest relative difference {off:.1e}")


if __name__ == "__main__":
    sys.exit(main())
