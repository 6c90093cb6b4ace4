"""RNN, LSTM and GRU by hand: the same numbers as torch.nn, and what their gates are for.

    python examples/article/rnn.py

All three read one token after the other and keep a hidden state h of constant size. An RNN writes
h anew at every step, so what it knew fades with a factor per step. LSTM and GRU have gates between
0 and 1 that say, for every number of the state, how much of it to keep and how much to write.

The task here is a latch: among inputs that do not matter, some are marked; say at every step what
the last marked input was. It is trained on 40 steps and tried on 160.
"""

from __future__ import annotations

import sys

import report
import torch
from report import cli, plt
from torch import Tensor, nn

HIDDEN = 16


def rnn_step(x: Tensor, state: Tensor, p: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x [B, I], state [1, B, D] -> h [B, D], state, gates (none)."""
    h = torch.tanh(x @ p.weight_ih_l0.T + p.bias_ih_l0 + state[0] @ p.weight_hh_l0.T + p.bias_hh_l0)
    return h, h[None], {}


def lstm_step(x: Tensor, state: Tensor, p: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x [B, I], state (h, c) [2, B, D] -> h [B, D], state, gates [B, D].

    Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.
    """
    h, c = state
    gates = x @ p.weight_ih_l0.T + p.bias_ih_l0 + h @ p.weight_hh_l0.T + p.bias_hh_l0  # [B, 4 D]
    i, f, g, o = gates.chunk(4, 1)
    i, f, o = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
    c = f * c + i * torch.tanh(g)  # forget gate: how much stays; input gate: how much comes in
    h = o * torch.tanh(c)  # output gate: how much is shown
    return h, torch.stack((h, c)), {"input": i, "forget": f, "output": o}


def gru_step(x: Tensor, state: Tensor, p: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x [B, I], state [1, B, D] -> h [B, D], state, gates [B, D]. Cho et al. 2014."""
    (h,) = state
    x_r, x_z, x_n = (x @ p.weight_ih_l0.T + p.bias_ih_l0).chunk(3, 1)
    h_r, h_z, h_n = (h @ p.weight_hh_l0.T + p.bias_hh_l0).chunk(3, 1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)  # reset gate: how much of the past the new content sees
    h = z * h + (1 - z) * n  # update gate: one gate keeps and writes, where LSTM has two
    return h, h[None], {"reset": r, "update": z}


STEPS = {"RNN": (rnn_step, nn.RNN), "LSTM": (lstm_step, nn.LSTM), "GRU": (gru_step, nn.GRU)}


def unroll(name: str, x: Tensor, p: nn.Module) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """x [B, T, I] -> h of every step [B, T, D], and the gates of every step."""
    step = STEPS[name][0]
    state = x.new_zeros(2 if name == "LSTM" else 1, x.shape[0], p.hidden_size)
    outputs, gates = [], []
    for token in x.unbind(1):  # nothing here can run side by side: step t needs h of step t - 1
        h, state, gate = step(token, state, p)
        outputs.append(h)
        gates.append(gate)
    return torch.stack(outputs, 1), gates


def latch(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs (value, mark) [B, T, 2], and 1 where the last marked value was positive [B, T]."""
    values = torch.randint(0, 2, (batch, length)) * 2.0 - 1
    marks = (torch.rand(batch, length) < 1 / 20).float()
    marks[:, 0] = 1
    steps = torch.arange(length).expand(batch, -1)
    last = torch.where(marks > 0, steps, 0).cummax(1).values  # [B, T], of the last mark
    return torch.stack((values, marks), 2), (values.gather(1, last) > 0).float()


def train(name: str, iterations: int) -> tuple[nn.Module, nn.Linear]:
    """Our cell with weights of torch.nn's (for their names and initial values), and a readout."""
    cell, readout = STEPS[name][1](2, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 1)
    parameters = [*cell.parameters(), *readout.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(iterations):
        x, target = latch(32, 40)
        logits = readout(unroll(name, x, cell)[0])[..., 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return cell, readout


@torch.no_grad()
def accuracy(name: str, cell: nn.Module, readout: nn.Linear, length: int) -> float:
    x, target = latch(256, length)
    found = readout(unroll(name, x, cell)[0])[..., 0] > 0
    return (found == target.bool()).float().mean().item()


def gradient_by_distance(name: str, length: int = 60) -> Tensor:
    """|d h_T / d x_t| for t from T down to 1, [T], of an untrained cell: how the past fades."""
    cell = STEPS[name][1](8, 64, batch_first=True)
    x = torch.randn(1, length, 8, requires_grad=True)
    y = unroll(name, x, cell)[0][0, -1]
    (gradient,) = torch.autograd.grad(y @ torch.randn(64), x)
    return gradient[0].norm(dim=1).flip(0)


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--iterations", type=cli.positive, default=200, help="of training")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    cells, rows = {}, []
    for name, (_, module) in STEPS.items():
        reference = module(2, HIDDEN, batch_first=True)
        x = latch(4, 100)[0]
        with torch.no_grad():
            same = report.difference(unroll(name, x, reference)[0], reference(x)[0])
        cells[name] = train(name, args.iterations)
        scores = [f"{accuracy(name, *cells[name], length):.3f}" for length in (40, 160)]
        size = sum(p.numel() for p in reference.parameters())
        rows.append((name, size, 2 * HIDDEN if name == "LSTM" else HIDDEN, same, *scores))
    header = ("cell", "parameters", "state", "off torch.nn", "accuracy at 40", "at 160 steps")
    report.table(header, rows)

    figure, (left, *panels) = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=(1, 1.2, 1.2))
    for name in STEPS:
        left.semilogy(gradient_by_distance(name).numpy(), label=name)
    left.set(title="untrained: the past fades", xlabel="steps back", ylabel="|d h / d x|")
    left.legend()
    x, _ = latch(1, 60)
    for axes, name, gate, keeps in zip(
        panels, ("LSTM", "GRU"), ("forget", "update"), ("c", "h"), strict=True
    ):
        with torch.no_grad():
            gates = unroll(name, x, cells[name][0])[1]
        image = torch.stack([step[gate][0] for step in gates], 1)  # [D, T]
        picture = axes.imshow(image.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        for t in x[0, :, 1].nonzero()[:, 0].tolist():
            axes.plot(t, -1, "rv", clip_on=False)
        axes.set(title=f"{name}: {gate} gate, 1 keeps {keeps} (marks in red)", xlabel="step")
        figure.colorbar(picture)
    panels[0].set(ylabel="unit")
    report.save(figure, args.out, "rnn")


if __name__ == "__main__":
    sys.exit(main())
