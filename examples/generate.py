"""Writes text with a byte-level RWKV-6, one token at a time, from a state of constant size.

    python examples/generate.py run/model.pth --prompt "In the beginning"

The prompt goes through the model in one call; every further token is a call of its own that reads
and returns the state. No earlier token is ever looked at again, so the time and memory of a token
do not depend on how many came before.
"""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from torch_rwkv6.nn import RWKV6


def load_model(path: str) -> RWKV6:
    """From an official-layout ``.pth``, or a Lightning checkpoint of train_lm.py.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no byte-level RWKV-6.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler or unzipper met
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no PyTorch checkpoint: {reason}") from error
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        tensors = content["state_dict"]
        content = {n.removeprefix("model."): x for n, x in tensors.items()}
    model = RWKV6.from_state_dict(content)
    if model.vocab_size > 256:
        raise ValueError(
            f"{path} has a vocabulary of {model.vocab_size} tokens: this script speaks bytes and "
            "has no tokenizer for it"
        )
    return model.eval()


def sample(
    logits: torch.Tensor,  # [V]
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
) -> int:
    """One token: the likeliest for temperature 0, otherwise drawn from the top_p nucleus."""
    if temperature == 0:
        return int(logits.argmax())
    p, token = torch.softmax(logits.float().cpu() / temperature, 0).sort(descending=True)
    p[p.cumsum(0) - p > top_p] = 0  # the first token stays whatever top_p is
    return int(token[torch.multinomial(p, 1, generator=generator)])


@torch.inference_mode()
def generate(
    model: RWKV6,
    prompt: bytes,
    length: int,
    temperature: float = 0.8,
    top_p: float = 0.9,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields ``length`` bytes that follow the prompt, which must not be empty."""
    tokens, state = list(prompt), None
    for _ in range(length):
        # the first call reads the whole prompt, every other one token
        logits, state = model(torch.tensor([tokens], device=model.emb.weight.device), state)
        tokens = [sample(logits[0, -1], temperature, top_p, generator)]
        yield tokens[0]


def _kib(tensors: Iterable[torch.Tensor]) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / 1024


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="a .pth in the official layout, or a Lightning .ckpt")
    parser.add_argument("--prompt", default="\n", help="text to go on from")
    parser.add_argument("--length", type=int, default=500, help="number of bytes to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-p", type=float, default=0.9, help="share of the likeliest bytes")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    try:
        if args.length < 0 or args.temperature < 0 or not 0 < args.top_p <= 1:
            raise ValueError("--length and --temperature must be >= 0, --top-p in (0, 1]")
        if not args.prompt:
            raise ValueError("--prompt must not be empty")
        prompt = args.prompt.encode()
        model = load_model(args.model).to(args.device)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"generate.py: error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 2

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be split
    generator = torch.Generator().manual_seed(args.seed)
    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    for token in generate(model, prompt, args.length, args.temperature, args.top_p, generator):
        print(decoder.decode(bytes([token])), end="", flush=True)
    seconds = time.perf_counter() - start
    print(decoder.decode(b"", final=True), flush=True)
    print(
        f"{args.length} tokens in {seconds:.2f} s, {args.length / max(seconds, 1e-9):.0f} tokens/s;"
        f" memory: parameters {_kib(model.parameters()):,.0f} KiB, state "
        f"{_kib(model.initial_state(1)):,.1f} KiB at every length",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
