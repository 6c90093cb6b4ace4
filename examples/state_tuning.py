"""State tuning: trains the states that texts start from, and nothing else.

    pip install torch_rwkv6[examples]
    python examples/state_tuning.py                                   # Proverbs, about ten seconds
    python examples/state_tuning.py --checkpoint model.pth --data my.txt --steps 1000

A recurrent model knows what it has read by its state alone, so a state is a prompt: a trained one
is the best prompt of this size, and costs nothing when the model is used. The checkpoint stays as
it is; the result is one ``att.time_state`` tensor per layer, in the official layout. After
"State-tuning" in the README of BlinkDL/RWKV-LM, with its learning rate from 1 to 0.01.
"""

from __future__ import annotations

import sys

import cli
import torch
from text_model import bits_per_token, finetune, finetuning_parser, read_inputs
from torch import Tensor

from torch_rwkv6.models import load, save
from torch_rwkv6.nn import RWKV6, RWKVState


@torch.inference_mode()
def bits_with_prompt(
    model: RWKV6, prompt: bytes | list[int], text: bytes | list[int], length: int
) -> float:
    """As `bits_per_token`, every piece read after the same prompt."""
    _, state = model(torch.tensor([list(prompt)]))

    def read(tokens: Tensor, _: None) -> tuple[Tensor, RWKVState]:
        return model(tokens, state.select([0] * len(tokens)))

    return bits_per_token(read, text, length)


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = finetuning_parser(__doc__, lr=1.0, out="state.pth")
    args = parser.parse_args(argv)
    inputs = read_inputs(args)
    model = load(inputs.weights, train_state=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".att.time_state"))

    before = bits_per_token(model, inputs.test_text, args.length)
    prompt = inputs.train_text[-256:]
    prompted = bits_with_prompt(model, prompt, inputs.test_text, args.length)
    interrupted = finetune(model, inputs.train_text, args)
    after = bits_per_token(model, inputs.test_text, args.length)

    states = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    save(states, args.out)
    size = sum(x.numel() for x in states.values())
    print(
        f"bits per {inputs.token} of pieces of {args.length}, not trained on\n"
        f"  from zero states: {before:.3f}\n"
        f"  after a prompt of {len(prompt)} {inputs.token}s of the text: {prompted:.3f}\n"
        f"  from trained states ({size:,} numbers): {after:.3f}\n"
        f"written to {args.out}: {len(states)} tensors, to be loaded beside the checkpoint"
    )
    if interrupted:
        raise KeyboardInterrupt(cli.EARLY)


if __name__ == "__main__":
    sys.exit(main())
