"""Text generation: reads a prompt in pieces, then draws token after token, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_rwkv6 import arguments
from torch_rwkv6.models.sampling import Penalties, Sampling, draw, probabilities
from torch_rwkv6.models.tokenizers import Tokenizer
from torch_rwkv6.nn import RWKV, RWKVState
from torch_rwkv6.nn.sharded import device_of

__all__ = ["generate", "generate_text"]

Prompt: TypeAlias = "Tensor | npt.NDArray[Any] | Sequence[int] | Sequence[Sequence[int]]"

PIECE = 512  # tokens of a prompt at a time: more are no faster


def generate(
    model: RWKV,
    prompt: Prompt,  # [B, T]
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
) -> Generator[Tensor, None, None]:  # [B] each
    """Yields the next token of every sequence, step by step, in constant time and memory per step.

    ::

        for token in torch_rwkv6.generate(model, [5, 17], max_tokens=20):  # [1], int64
            print(token.item())

    The prompt is read in pieces; then every step updates the state in place. Arguments are checked
    when this function is called, before the first token is requested.

    **After a generation the state of each row has seen exactly the prompt and the tokens that were
    yielded for it**, -1 apart, whatever ended it: max_tokens, a stop token, an error, or a caller
    who asks for no more. The next call's prompt is what comes next. To go on with no new text,
    give a larger max_tokens and take from the iterator what is wanted.

    Args:
        model: of any version.
        prompt: token ids as a tensor or array, [B, T] or [T], as a list of ids, or as a list of B
            such lists, which may have different lengths. At least one token each.
        max_tokens: how many tokens to write.
        temperature, top_k, top_p: see `Sampling`. temperature 0 takes the likeliest token.
        alpha_presence, alpha_frequency, alpha_decay: repetition penalties: see `Penalties`.
            ChatRWKV's own settings are 0.2, 0.2 and 0.996.
        free_tokens: tokens whose repetitions are not counted: see `Penalties`.
        stop_tokens: a sequence ends before the first of these. From then on -1 is yielded for it,
            until all sequences have ended; it leaves the batch that is computed.
        seed: from 0 to 2**63 - 1: the same seed gives the same tokens; None is a new one. Row b of
            a batch draws what it would alone with seed + b, whatever becomes of the other rows.
            Up to rounding, that is: logits may differ in their last digits between batch sizes.
        state: to go on from, with B rows, as `RWKV.forward` returned or as it was left by an
            earlier call; it is updated in place. None is the start of every sequence.
        compiled: runs the decoding step through torch.compile, of its default backend (True), or
            of the one named. The default one needs a C++ compiler and, at first, time: 40 seconds
            for a single layer. It compiles anew when a row of a batch has ended. RWKV-6 on a CPU is
            as fast without.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; a state that is not
            this model's.
        IndexError: a token that the vocabulary does not have.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    _check_model(model)
    vocab_size = model.vocab_size
    sampling = Sampling(temperature, top_k, top_p)
    free = arguments.tokens("free_tokens", free_tokens, vocab_size)
    penalties = Penalties(alpha_presence, alpha_frequency, alpha_decay, free)
    stops = arguments.tokens("stop_tokens", stop_tokens, vocab_size)
    rows = _rows(prompt, vocab_size)
    max_tokens = arguments.integer("max_tokens", max_tokens, 0)
    if seed is None:
        seed = int(torch.randint(2**31, (), dtype=torch.int64, device="cpu").item())
    seed = arguments.integer("seed", seed, 0, 2**63 - 1)
    generators = [torch.Generator("cpu").manual_seed(seed + b) for b in range(len(rows))]
    if state is not None:
        _check_state(model, state, len(rows))
    if not isinstance(compiled, (bool, str)):
        raise TypeError(f"compiled: expected a bool or a backend's name, got {compiled!r}")
    step: Callable[[Tensor, RWKVState], Tensor] = model.forward_
    if compiled:
        step = torch.compile(step, backend="inductor" if compiled is True else compiled)
    # A state made in inference mode can be updated in that mode only.
    inference = state is not None and any(x.is_inference() for x in state)
    guard = torch.inference_mode() if inference else torch.no_grad()
    return guard(_tokens)(
        model, rows, max_tokens, sampling, penalties, stops, generators, state, step
    )


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
) -> Generator[Tensor, None, None]:
    if max_tokens == 0 and state is None:
        return
    device = device_of(model.ln_out.weight)
    own = model.initial_state(len(rows)) if state is None else state  # of the rows that go on
    logits = _prefill(model, [row.to(device) for row in rows], own)  # [rows that go on, V]
    going = torch.arange(len(rows), device=device)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=device)
    for i in range(max_tokens):
        token = draw(*probabilities(penalties.apply(logits), sampling), generators)
        stopped = torch.isin(token, stops)
        if stop_tokens and bool(stopped.any()):
            kept = (~stopped).nonzero()[:, 0]
            going, token, logits, own = going[kept], token[kept], logits[kept], own.select(kept)
            generators = [generators[b] for b in kept.tolist()]
            penalties.select(kept)
            if not len(going):
                return
        # Before the token is yielded, so that the state has seen it wherever the caller stops. What
        # follows the last token only a state that the caller has can tell
        if state is not None or i + 1 < max_tokens:
            penalties.add(token, logits)
            logits = step(token[:, None], own)
        if state is not None and len(going) < len(rows):
            _write(state, going, own)
        yield torch.full((len(rows),), -1, device=device).index_copy(0, going, token)


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
        _write(state, [b], own)
    return torch.cat(logits_of)


def _write(state: RWKVState, rows: Tensor | list[int], own: RWKVState) -> None:
    for x, new in zip(state, own, strict=True):
        x[:, rows] = new


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "forward_"):
        raise TypeError(f"model: expected an RWKV, got {type(model).__name__}")


def _check_state(model: RWKV, state: RWKVState, rows: int) -> None:
    if not isinstance(state, RWKVState):
        raise TypeError(f"state: expected an RWKVState, got {type(state).__name__}")
    found = {x.shape[1] for x in state if isinstance(x, Tensor) and x.dim() > 1}
    if len(found) == 1 and found != {rows}:
        raise ValueError(
            f"state: expected {rows} rows, one per prompt, got {found.pop()} "
            "(RWKVState.select repeats)"
        )
    model.check_state(state, rows)
    for field, x, own in zip(RWKVState._fields, state, model.initial_state(0), strict=True):
        name = f"state.{field}"
        if x.dtype != own.dtype:
            raise TypeError(f"{name}: expected {own.dtype}, got {x.dtype} (RWKVState.to converts)")
    state.check_memory()


def _rows(prompt: Prompt, vocab_size: int) -> list[Tensor]:
    """The prompts, [T] int64 each."""
    if isinstance(prompt, Tensor):
        if prompt.is_nested or prompt.layout != torch.strided or prompt.is_meta:
            kind = "a nested one" if prompt.is_nested else f"{prompt.layout} on {prompt.device}"
            raise ValueError(f"prompt: expected a dense tensor with values, got {kind}")
        integers = not (prompt.is_floating_point() or prompt.is_complex())
        if prompt.dim() not in (1, 2) or not integers or prompt.dtype == torch.bool:
            raise ValueError(
                f"prompt: expected integer token ids [B, T] or [T], got {prompt.dtype} of shape "
                f"{tuple(prompt.shape)}"
            )
        ids = prompt.long()
        rows = list(ids if ids.dim() == 2 else ids[None])
        if ids.numel():
            for extreme in ids.aminmax():
                arguments.token("prompt", extreme, vocab_size)
    else:
        values: Any = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(
                f"prompt: expected token ids, got {type(prompt).__name__} (generate_text takes "
                "text)"
            )
        are_rows = [_is_row(value) for value in values]
        if any(are_rows) and not all(are_rows):
            raise TypeError("prompt: expected token ids or lists of them, got both in one list")
        if values and not any(are_rows):
            values = [values]
        rows = [
            torch.tensor(
                [arguments.token("prompt", t, vocab_size) for t in row],
                dtype=torch.int64,
                device="cpu",
            )
            for row in values
        ]
    if not rows or not all(len(row) for row in rows):
        raise ValueError("prompt: expected at least one sequence of at least one token")
    return rows


def _is_row(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Sequence)


def generate_text(
    model: RWKV,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 100,
    *,
    stop: str | Collection[str] = (),
    **options: object,
) -> Iterator[str]:
    """Yields the text that follows the prompt, as soon as its characters are whole.

    A character split over tokens is held back until its last byte is there; bytes that are no
    UTF-8 come as U+FFFD. What may be the beginning of a stop is held back until it is known.

    Args:
        model: of any version.
        tokenizer: the model's own: see `load_tokenizer`.
        prompt: text to go on from.
        max_tokens: how many tokens to write.
        stop: a text, or several: what is written ends before the first of them to be complete. The
            tokens that make it up are the last ones that the state has seen.
        options: of `generate`, stop_tokens and state among them.

    Raises:
        TypeError, ValueError: as `generate`; an empty prompt or stop; a vocabulary larger than the
            model's.
    """
    _check_model(model)
    if not hasattr(tokenizer, "stream"):
        raise TypeError(
            f"tokenizer: expected one of load_tokenizer, got {type(tokenizer).__name__}"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer: its {tokenizer.vocab_size} tokens are more than the model's "
            f"{model.vocab_size}"
        )
    if not isinstance(prompt, str):
        raise TypeError(
            f"prompt: expected text, got {type(prompt).__name__} (generate takes tokens)"
        )
    try:
        tokens = tokenizer.encode(prompt)
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt: expected text that the tokenizer has, got {error}") from error
    if not tokens:
        raise ValueError("prompt: expected some text, got none")
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Collection) or not all(isinstance(text, str) for text in stops):
        raise TypeError(f"stop: expected a text or several, got {stop!r}")
    if not all(stops):
        raise ValueError("stop: expected some text, got an empty one")
    stream = generate(model, tokens, max_tokens, **options)  # type: ignore[arg-type]
    return _text(stream, tokenizer, list(stops))


def _text(
    stream: Generator[Tensor, None, None], tokenizer: Tokenizer, stops: list[str]
) -> Iterator[str]:
    decoder, held = tokenizer.stream(), ""
    with closing(stream):
        for token in stream:
            text, held, ended = _cut(held + decoder.push(int(token)), stops)
            if text:
                yield text
            if ended:
                return
    text, held, ended = _cut(held + decoder.flush(), stops)
    if text + held:
        yield text + held


def _cut(text: str, stops: list[str]) -> tuple[str, str, bool]:
    """What may be shown, what may be the beginning of a stop, and whether there was a stop."""
    ends = [text.index(stop) for stop in stops if stop in text]
    if ends:
        return text[: min(ends)], "", True
    sizes = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    cut = len(text) - max(sizes, default=0)
    return text[:cut], text[cut:], False
