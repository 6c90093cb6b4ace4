"""Training on long documents, chunk by chunk, with states carried from chunk to chunk.

    pip install torch_rwkv6[examples]
    python examples/infctx.py                      # documents of 2048 bytes, in chunks of 256
    python examples/infctx.py --window 1           # truncated: no gradient beyond a chunk

A document is read in chunks. The state is carried from chunk to chunk and from document to
document, so the context is unlimited ("infctx"). The gradient flows back through the states over
``--window`` chunks and is cut there (truncated backpropagation through time, Williams and Peng
1990). Inside a window only the states between chunks are kept, and a chunk is recomputed in the
backward pass: this takes the memory of one chunk, and a window as long as the document gives the
exact gradient. It needs an operator whose initial and final states have gradients.

Before training, gradient and memory are compared with backpropagation through the whole document.
"""

from __future__ import annotations

import sys

import cli
import torch
from cli import positive
from corpus import read_text
from memory import peak_memory
from text_data import Lanes
from text_model import TextModel, loss_of, stopping, trainer, training_parser
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from torch_rwkv6.nn import RWKV6, RWKVState


def backward_in_chunks(
    model: RWKV6,
    tokens: Tensor,  # [B, T], a document a row
    targets: Tensor,  # [B, T]
    state: RWKVState | None,
    chunk: int,
    window: int,
    backward=Tensor.backward,
) -> tuple[Tensor, RWKVState]:
    """Adds the gradient of the document's mean loss; returns that loss and the last state."""
    pieces = list(zip(tokens.split(chunk, 1), targets.split(chunk, 1), strict=True))
    total = tokens.new_zeros((), dtype=torch.float32)
    for start in range(0, len(pieces), window):
        loss = total.new_zeros(())
        for piece in pieces[start : start + window]:
            mean, state = checkpoint(loss_of, model, *piece, state, use_reentrant=False)
            loss = loss + mean * (piece[0].numel() / tokens.numel())
        backward(loss)
        state = state.detach()
        total += loss.detach()
    return total, state


class InfctxModel(TextModel):
    """Each step reads one document per lane; the states are carried from step to step."""

    def __init__(self, model: RWKV6, lr: float, steps: int, chunk: int, window: int) -> None:
        super().__init__(model, lr, steps)
        self.automatic_optimization = False  # the backward pass is run window by window
        self.chunk, self.window = chunk, window
        self.state: RWKVState | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        loss, self.state = backward_in_chunks(
            self.model, *batch, self.state, self.chunk, self.window, self.manual_backward
        )
        self.record(loss)
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        schedule.step()


def gradient(model: RWKV6) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def compare(model: RWKV6, batch: tuple[Tensor, Tensor], chunk: int, window: int) -> list[str]:
    """One line per way of computing a document's gradient: its peak memory and its error."""
    tokens = batch[0].shape[1]

    def whole() -> None:
        loss_of(model, *batch)[0].backward()

    ways = {f"the whole document of {tokens} bytes": whole}
    chunks = -(-tokens // chunk)
    for n in sorted({1, min(window, chunks), chunks}):
        ways[f"chunks of {chunk}, gradient over {n}"] = lambda n=n: backward_in_chunks(
            model, *batch, None, chunk, n
        )
    lines, exact = [], None
    for name, way in ways.items():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # there before memory is counted
        mib = peak_memory(way) / 2**20
        exact = gradient(model) if exact is None else exact
        off = ((gradient(model) - exact).norm() / exact.norm()).item()
        lines.append(f"  {name}: {mib:.1f} MiB, gradient off by {off:.1e}")
    return lines


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = training_parser(__doc__, lr=6e-3, steps=40, batch_size=4)
    parser.add_argument("--document", type=positive, default=2048, help="bytes in a step and lane")
    parser.add_argument("--chunk", type=positive, default=256, help="bytes computed at once")
    parser.add_argument("--window", type=positive, default=8, help="chunks a gradient goes through")
    args = parser.parse_args(argv)
    text = read_text(args.data)
    lanes = Lanes(text, args.batch_size, args.document, endless=True)
    torch.manual_seed(args.seed)
    model = RWKV6(256, 2, 64, 32, lora_mix=8, lora_decay=8)

    module = InfctxModel(model, args.lr, args.steps, args.chunk, args.window)
    of_run = trainer(args.steps)
    with stopping(of_run) as stop:
        of_run.fit(module, DataLoader(lanes, batch_size=None))
    if stop.reason:
        raise stop.reason
    print(
        f"loss: {module.losses[0]:.3f} at the first document, {module.losses[-1]:.3f} at the last"
    )
    print("one document with the trained model: peak memory and gradient")
    print("\n".join(compare(model, next(iter(lanes)), args.chunk, args.window)))


if __name__ == "__main__":
    sys.exit(main())
