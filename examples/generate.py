"""Writes text with an RWKV of any version, one token at a time, from a state of constant size.

    python examples/generate.py run/model.pth --prompt "In the beginning"

The prompt goes through the model in one call; every further token is a call of its own that reads
and updates the state. No earlier token is ever looked at again, so the time and memory of a token
do not depend on how many came before. (`python -m torch_rwkv6 generate` has more options.)
"""

from __future__ import annotations

import sys
import time

import cli
from corpus import tokenizer_of

from torch_rwkv6.models import generate_text, load


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("model", help="a checkpoint, or a Lightning .ckpt of train_lm.py")
    parser.add_argument("--prompt", default="\n", help="text to go on from")
    parser.add_argument("--tokenizer", help=cli.TOKENIZER)
    parser.add_argument("--length", type=cli.positive, default=500, help="tokens to write")
    parser.add_argument(
        "--temperature", type=cli.number(least=0), default=0.8, help="0 takes the likeliest"
    )
    parser.add_argument(
        "--top-p", type=cli.share, default=0.9, help="share of the likeliest tokens"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    model = load(args.model, args.device).eval()
    tokenizer = tokenizer_of(model.vocab_size, args.tokenizer)
    settings = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    text = generate_text(model, tokenizer, args.prompt, args.length, **settings)

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


if __name__ == "__main__":
    sys.exit(main())
