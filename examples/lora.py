"""LoRA through peft: finetunes small additions to the matrices of a checkpoint, then merges them.

    pip install torch_rwkv6[examples]
    python examples/lora.py                                           # Proverbs, about ten seconds
    python examples/lora.py --checkpoint model.pth --data my.txt --rank 16 --out merged.pth

Every linear layer of the blocks gets a product of two narrow matrices beside it (Hu et al.,
arXiv:2106.09685); the checkpoint itself is frozen. `torch_rwkv6.nn.RWKV6` is an ordinary module, so
peft needs to know no more than the names of its layers. Merged, the result is a checkpoint like
any other, under the official names: for ``generate.py``, ``state_tuning.py`` or other programs.
"""

from __future__ import annotations

import sys

import cli
from text_model import bits_per_token, finetune, finetuning_parser, read_inputs

from torch_rwkv6.models import load, save

# of the time mixing, and of the channel mixing, which has key, value and receptance too
LAYERS = ("receptance", "key", "value", "gate", "output")


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = finetuning_parser(__doc__, lr=1e-2, out="merged.pth")
    parser.add_argument("--rank", type=cli.positive, default=8, help="of the additions")
    parser.add_argument(
        "--alpha", type=cli.number(above=0), default=16, help="they are scaled by alpha / rank"
    )
    args = parser.parse_args(argv)
    inputs = read_inputs(args)
    from peft import LoraConfig, get_peft_model  # seconds, as it imports transformers

    base = load(inputs.weights)
    config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=list(LAYERS))
    model = get_peft_model(base, config)

    before = bits_per_token(model, inputs.test_text, args.length)
    interrupted = finetune(model, inputs.train_text, args)
    after = bits_per_token(model, inputs.test_text, args.length)
    trained, of = model.get_nb_trainable_parameters()

    merged = model.merge_and_unload()
    save(merged, args.out)
    print(
        f"bits per {inputs.token} of pieces of {args.length}, not trained on\n"
        f"  checkpoint: {before:.3f}\n"
        f"  with LoRA ({trained:,} numbers beside {of - trained:,}): {after:.3f}\n"
        f"  merged: {bits_per_token(merged, inputs.test_text, args.length):.3f}\n"
        f"written to {args.out}, in the official layout"
    )
    if interrupted:
        raise KeyboardInterrupt(cli.EARLY)


if __name__ == "__main__":
    sys.exit(main())
