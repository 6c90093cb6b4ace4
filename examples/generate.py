"""Writes text with an RWKV of any version, one token at a time, from a state of constant size.

    python examples/generate.py run/model.pth --prompt "In the beginning"

The prompt goes through the model in one call; every further token is a call of its own that reads
and updates the state. No earlier token is ever looked at again, so the time and memory of a token
do not depend on how many came before. (`python -m torch_rwkv6 generate` has more options.)
"""

from __future__ import annotations

import argparse
import sys
import time

from torch_rwkv6.models import generate_text, load, load_tokenizer
from torch_rwkv6.models.checkpoint import read
from torch_rwkv6.nn import RWKV


def load_model(path: str) -> RWKV:
    """From a checkpoint of any kind, or a Lightning checkpoint of train_lm.py.

    Raises:
        OSError, TypeError, ValueError: as `torch_rwkv6.models.load`.
    """
    if not path.endswith(".ckpt"):
        return load(path).eval()
    tensors = read(path).get("state_dict")
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} is no Lightning checkpoint: it has no state_dict")
    return load({name.removeprefix("model."): x for name, x in tensors.items()}).eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="a checkpoint, or a Lightning .ckpt of train_lm.py")
    parser.add_argument("--prompt", default="\n", help="text to go on from")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, world or a .json file")
    parser.add_argument("--length", type=int, default=500, help="number of tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, default=0.9, help="share of the likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    try:
        model = load_model(args.model).to(args.device)
        settings = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        tokenizer = load_tokenizer(args.tokenizer)
        text = generate_text(model, tokenizer, args.prompt, args.length, **settings)
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"generate.py: error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 2

    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    for piece in text:
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    print(flush=True)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
    state = sum(x.numel() * x.element_size() for x in model.initial_state(1)) / 1024
    print(
        f"{args.length} tokens in {seconds:.2f} s, {args.length / max(seconds, 1e-9):.0f} tokens/s;"
        f" memory: parameters {parameters:,.0f} KiB, state {state:,.1f} KiB at every length",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
