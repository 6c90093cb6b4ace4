"""Text generation: a prompt in pieces, then one token after the other, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from torch_rwkv6.models.sampling import Penalties, Sampling, draw, probabilities
from torch_rwkv6.models.tokenizers import Tokenizer
from torch_rwkv6.nn import RWKV, RWKVState

__all__ = ["generate", "generate_text"]

PIECE = 512  # tokens of a prompt at a time: more are no faster


def generate(
    model: RWKV,
    prompt: Tensor | Sequence[int] | Sequence[Sequence[int]],  # [B, T]
    max_tokens: int = 100,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.85,
    alpha_presence: float = 0.0,
    alpha_frequency: float = 0.0,
    alpha_decay: float = 0.996,
    free_tokens: Collection[int] = (),
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
    state: RWKVState | None = None,
    compiled: bool | str = False,
) -> Iterator[Tensor]:  # [B] each
    """Yields the next token of every sequence, again and again. Time and memory do not grow.

    ::

        for token in torch_rwkv6.generate(model, [5, 17], max_tokens=20):  # [1], int64
            print(token.item())

    The prompt is read in pieces; then every step reads and updates the state in place. Arguments
    are checked before the first token is asked for.

    Args:
        model: of any version.
        prompt: token ids, [B, T], a list of ids, or a list of B such lists, which may have
            different lengths. At least one token each.
        max_tokens: how many tokens to write.
        temperature, top_k, top_p: see `Sampling`. temperature 0 takes the likeliest token.
        alpha_presence, alpha_frequency, alpha_decay: repetition penalties: see `Penalties`.
            ChatRWKV's own settings are 0.2, 0.2 and 0.996.
        free_tokens: tokens whose repetitions are not counted: see `Penalties`.
        stop_tokens: a sequence ends before the first of these. From then on -1 is yielded for it,
            until all sequences have ended.
        seed: the same seed gives the same tokens; None is a new one. Row b of a batch draws what
            it would alone with seed + b.
        state: to go on from, with B rows, as `RWKV.forward` returned or as it was left by an
            earlier call; it is updated in place. None is the start of every sequence.
        compiled: runs the decoding step through torch.compile, of its default backend (True), or
            of the one named. The default one needs a C++ compiler and, at first, time: 40 seconds
            for a single layer. RWKV-6 on a CPU is as fast without.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
        IndexError: a token that the vocabulary does not have.
        FloatingPointError: the model's logits are NaN.
    """
    sampling = Sampling(temperature, top_k, top_p)
    penalties = Penalties(alpha_presence, alpha_frequency, alpha_decay, free_tokens)
    rows = _rows(prompt, model.vocab_size)
    if max_tokens < 0:
        raise ValueError(f"max_tokens: expected 0 or more, got {max_tokens}")
    if state is not None and state.wkv.shape[1] != len(rows):
        raise ValueError(
            f"state: expected {len(rows)} rows, one a prompt, got {state.wkv.shape[1]}"
        )
    if seed is None:
        seed = int(torch.randint(2**31, ()).item())
    generators = [torch.Generator().manual_seed(seed + b) for b in range(len(rows))]
    step: Callable[[Tensor, RWKVState], Tensor] = model.forward_
    if compiled:
        step = torch.compile(step, backend="inductor" if compiled is True else compiled)
    return _tokens(
        model, rows, max_tokens, sampling, penalties, set(stop_tokens), generators, state, step
    )


@torch.no_grad()
def _tokens(
    model: RWKV,
    rows: list[Tensor],  # [T] each
    max_tokens: int,
    sampling: Sampling,
    penalties: Penalties,
    stop_tokens: set[int],
    generators: list[torch.Generator],
    state: RWKVState | None,
    step: Callable[[Tensor, RWKVState], Tensor],
) -> Iterator[Tensor]:
    device = model.emb.weight.device
    if max_tokens == 0:
        return
    state = model.initial_state(len(rows)) if state is None else state
    logits = _prefill(model, [row.to(device) for row in rows], state)  # [B, V]
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=device)
    for i in range(max_tokens):
        token = draw(*probabilities(penalties.apply(logits), sampling), generators)  # [B]
        if stop_tokens:
            ended |= torch.isin(token, stops)
            if bool(ended.all()):
                return
        yield token.masked_fill(ended, -1)
        if i + 1 == max_tokens:
            # the state has seen all but this token: the next call's prompt begins with it
            return
        penalties.add(token, logits)
        logits = step(token[:, None], state)


def _prefill(
    model: RWKV,
    rows: list[Tensor],  # [T] each
    state: RWKVState,
) -> Tensor:  # [B, V]
    """Reads the prompts; those of one length as a batch."""
    if len({len(row) for row in rows}) == 1:
        for piece in torch.stack(rows).split(PIECE, 1):
            logits = model.forward_(piece, state)
        return logits
    logits_of = []
    for b, row in enumerate(rows):
        own = state.select([b])
        for piece in row[None].split(PIECE, 1):
            logits = model.forward_(piece, own)
        logits_of.append(logits)
        for x, new in zip(state, own, strict=True):
            x[:, b] = new[:, 0]
    return torch.cat(logits_of)


def _rows(
    prompt: Tensor | Sequence[int] | Sequence[Sequence[int]], vocab_size: int
) -> list[Tensor]:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 2 or prompt.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"prompt: expected int64 or int32 token ids [B, T], got {prompt.dtype} of shape "
                f"{tuple(prompt.shape)}"
            )
        rows = list(prompt.long())
    elif isinstance(prompt, str) or not isinstance(prompt, Sequence):
        raise TypeError(
            f"prompt: expected token ids, got {type(prompt).__name__} (generate_text takes text)"
        )
    else:
        one = all(isinstance(t, int) for t in prompt)
        rows = [torch.tensor(row, dtype=torch.int64) for row in ([prompt] if one else prompt)]
    if not rows or any(row.dim() != 1 or not len(row) for row in rows):
        raise ValueError("prompt: expected at least one sequence of at least one token")
    for row in rows:
        for token in (int(row.min()), int(row.max())):
            if not 0 <= token < vocab_size:
                raise IndexError(f"prompt: expected tokens from 0 to {vocab_size - 1}, got {token}")
    return rows


def generate_text(
    model: RWKV,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 100,
    *,
    stop: Collection[str] = (),
    **options: object,
) -> Iterator[str]:
    """Yields the text that follows the prompt, as soon as its characters are whole.

    A character split over tokens is held back until its last byte is there; bytes that are no
    UTF-8 come as U+FFFD.

    Args:
        model: of any version.
        tokenizer: the model's own: see `load_tokenizer`.
        prompt: text to go on from.
        max_tokens: how many tokens to write.
        stop: the text ends before the first of these; each must be one token.
        options: of `generate`.

    Raises:
        TypeError, ValueError: as `generate`; an empty prompt; a stop of more than one token; a
            vocabulary larger than the model's.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer: its {tokenizer.vocab_size} tokens are more than the model's "
            f"{model.vocab_size}"
        )
    tokens = tokenizer.encode(prompt)
    if not tokens:
        raise ValueError("prompt: expected some text, got none")
    stops = set()
    for text in stop:
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise ValueError(f"stop: expected single tokens, but {text!r} is {len(ids)} of them")
        stops.add(ids[0])
    stream = generate(model, tokens, max_tokens, stop_tokens=stops, **options)  # type: ignore[arg-type]
    return _text(stream, tokenizer)


def _text(stream: Iterator[Tensor], tokenizer: Tokenizer) -> Iterator[str]:
    decoder = tokenizer.stream()
    for token in stream:
        piece = decoder.push(int(token))
        if piece:
            yield piece
    rest = decoder.flush()
    if rest:
        yield rest
