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

import torch
from cli import run
from text_model import bits_per_byte, finetune, finetuning_parser, read_inputs
from torch import Tensor

from torch_rwkv6.models import load
from torch_rwkv6.nn import RWKV6, RWKVState


@torch.inference_mode()
def bits_with_prompt(model: RWKV6, prompt: bytes, text: bytes, length: int) -> float:
    """As `bits_per_byte`, every piece read after the same prompt."""
    _, state = model(torch.tensor([list(prompt)]))

    def read(tokens: Tensor, _: None) -> tuple[Tensor, RWKVState]:
        return model(tokens, state.select([0] * len(tokens)))

    return bits_per_byte(read, text, length)


def main(argv: list[str] | None = None) -> None:
    parser = finetuning_parser(__doc__, lr=1.0, out="state.pth")
    args = parser.parse_args(argv)
    weights, train_text, test_text = read_inputs(args)
    model = load(weights, train_state=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".att.time_state"))

    before = bits_per_byte(model, test_text, args.length)
    prompted = bits_with_prompt(model, train_text[-256:], test_text, args.length)
    finetune(model, train_text, args)
    after = bits_per_byte(model, test_text, args.length)

    states = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    torch.save(states, args.out)
    size = sum(x.numel() for x in states.values())
    print(
        f"bits per byte of pieces of {args.length} bytes, not trained on\n"
        f"  from zero states: {before:.3f}\n"
        f"  after a prompt of 256 bytes of the text: {prompted:.3f}\n"
        f"  from trained states ({size:,} numbers): {after:.3f}\n"
        f"written to {args.out}: {len(states)} tensors, to be loaded beside the checkpoint"
    )


if __name__ == "__main__":
    run(main)
