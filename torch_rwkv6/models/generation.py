"""Text generation: a batch of prompts, or one text, through an `Engine` of their own."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_rwkv6 import arguments
from torch_rwkv6.models.engine import (
    PIECE,
    Engine,
    FinishReason,
    Processor,
    Prompt,
    Request,
    check_model,
    check_state,
    new_seed,
    rows_of,
)
from torch_rwkv6.models.sampling import from_settings
from torch_rwkv6.models.text import TextDecoder
from torch_rwkv6.models.tokenizers import Tokenizer
from torch_rwkv6.nn import RWKV, RWKVState

__all__ = ["GeneratedText", "Generation", "generate", "generate_text"]

TextFinishReason: TypeAlias = Literal["stop", "length", "end of text"]


class Generation(Iterator[Tensor]):
    """The tokens of a batch, step by step: what `generate` returns.

    Attributes:
        requests: one a row: what was written, its log-probabilities, and why it ended.
    """

    def __init__(self, requests: list[Request], tokens: Generator[Tensor, None, None]) -> None:
        self.requests, self._tokens = requests, tokens

    def __next__(self) -> Tensor:  # [B]
        return next(self._tokens)

    def close(self) -> None:
        """Ends it; the state stays as it is."""
        self._tokens.close()

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """For each row "stop" (a stop token), "length" or "error"; None while it goes on."""
        return [request.finish_reason for request in self.requests]


def generate(
    model: RWKV,
    prompt: Prompt,  # [B, T]
    max_tokens: int = 100,
    *,
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
    logprobs: int | None = None,
    processors: Sequence[Processor] = (),
    state: RWKVState | None = None,
    compiled: bool | str = False,
    **settings: Any,
) -> Generation:  # [B] each
    """Yields the next token of every sequence, step by step, in constant time and memory per step.

    ::

        for token in torch_rwkv6.generate(model, [5, 17], max_tokens=20):  # [1], int64
            print(token.item())

    The prompts are read in pieces, packed where they have different lengths; then every step
    updates the state in place. Arguments are checked when this function is called, before the
    first token is requested. An `Engine` does the work.

    **After a generation the state of each row has seen exactly the prompt and the tokens that were
    yielded for it**, -1 apart, whatever ended it: max_tokens, a stop token, an error, or a caller
    who asks for no more. The next call's prompt is what comes next. To go on with no new text,
    give a larger max_tokens and take from the iterator what is wanted.

    Args:
        model: of any version.
        prompt: token ids as a tensor or array, [B, T] or [T], as a list of ids, or as a list of B
            such lists, which may have different lengths. At least one token each.
        max_tokens: how many tokens to write.
        stop_tokens: a sequence ends before the first of these. From then on -1 is yielded for it,
            until all sequences have ended; it leaves the batch that is computed.
        seed: from 0 to 2**63 - 1: the same seed gives the same tokens; None is a new one. Row b of
            a batch draws what it would alone with seed + b, whatever becomes of the other rows.
            Up to rounding, that is: logits may differ in their last digits between batch sizes.
        logprobs: see `Engine.submit`; they are found in `Generation.requests`.
        processors: see `Engine.submit`.
        state: to go on from, with B rows, as `RWKV.forward` returned or as it was left by an
            earlier call; it is updated in place. None is the start of every sequence.
        compiled: runs the decoding step through torch.compile, of its default backend (True), or
            of the one named. The default one needs a C++ compiler and, at first, time: 40 seconds
            for a single layer. It compiles anew when a row of a batch has ended. RWKV-6 on a CPU is
            as fast without.
        settings: the attributes of `Sampling` (temperature, top_k, top_p, min_p, typical_p,
            logit_bias) and `Penalties` (alpha_presence, alpha_frequency, alpha_decay,
            free_tokens).

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; a state that is not
            this model's.
        IndexError: a token that the vocabulary does not have.
        FloatingPointError: the model's logits are NaN or infinite. (In a batch, after the tokens
            of the other rows have been yielded.)
    """
    check_model(model)
    sampling, penalties = from_settings(settings)
    rows = rows_of(prompt, model.vocab_size)
    seed = arguments.integer("seed", new_seed() if seed is None else seed, 0, 2**63 - 1)
    if state is not None:
        check_state(model, state, len(rows))
    engine = Engine(
        model, max_rows=len(rows), piece=PIECE * len(rows), compiled=compiled, pool=state
    )
    requests = [
        engine.submit(
            row,
            max_tokens,
            sampling=sampling,
            penalties=penalties,
            stop_tokens=stop_tokens,
            seed=seed + b,
            logprobs=logprobs,
            processors=processors,
            state=None if state is None else state.row(b),
            keep_state=state is not None,  # the last token is fed
        )
        for b, row in enumerate(rows)
    ]
    return Generation(requests, _tokens(engine, requests, state))


def _tokens(
    engine: Engine, requests: list[Request], state: RWKVState | None
) -> Generator[Tensor, None, None]:
    place = {request: b for b, request in enumerate(requests)}
    engine.read_prompts()
    _raise(requests)
    while engine.busy:
        steps = engine.step()
        if state is not None and engine.pool is not state:  # a row has been moved
            engine.write_states(state, {step.request: place[step.request] for step in steps})
        tokens = [-1] * len(requests)
        for step in steps:
            if step.token is not None:
                tokens[place[step.request]] = step.token
        if any(step.token is not None for step in steps):
            yield torch.tensor(tokens, dtype=torch.int64, device=engine.device)
        _raise(requests)


def _raise(requests: list[Request]) -> None:
    for request in requests:
        if request.error is not None:
            raise request.error


class GeneratedText(Iterator[str]):
    """The pieces of a text: what `generate_text` returns.

    Attributes:
        request: the tokens that were written, and their log-probabilities.
        finish_reason: None until the text has ended; then "stop" (a stop text or stop token),
            "length" (max_tokens) or "end of text" (the tokenizer's own token for it).
    """

    def __init__(
        self, generation: Generation, decoder: TextDecoder, end_tokens: Collection[int]
    ) -> None:
        self.request = generation.requests[0]
        self.finish_reason: TextFinishReason | None = None
        self._pieces = self._decoded(generation, decoder, end_tokens)

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends it; a state stays as it is."""
        self._pieces.close()

    def _decoded(
        self, generation: Generation, decoder: TextDecoder, end_tokens: Collection[int]
    ) -> Generator[str, None, None]:
        for token in generation:
            text = decoder.push(int(token))
            if decoder.stopped:
                generation.close()
                break
            if text:
                yield text
        else:
            text = decoder.flush()
        if decoder.stopped:
            self.finish_reason = "stop"
        elif self.request.stop_token in end_tokens:
            self.finish_reason = "end of text"
        else:
            self.finish_reason = "stop" if self.request.stop_token is not None else "length"
        if text:
            yield text


def generate_text(
    model: RWKV,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 100,
    *,
    stop: str | Collection[str] = (),
    stop_tokens: Collection[int] = (),
    end_tokens: Collection[int] | None = None,
    **options: Any,
) -> GeneratedText:
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
        stop_tokens: what is written ends before the first of these, too.
        end_tokens: those that end every text; None is the tokenizer's own, () is none.
        options: of `generate`, state among them.

    Raises:
        TypeError, ValueError: as `generate`; an empty prompt or stop; a vocabulary larger than the
            model's.
    """
    check_model(model)
    decoder = TextDecoder(tokenizer, stop)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer: its {tokenizer.vocab_size} tokens are more than the model's "
            f"{model.vocab_size}"
        )
    if not isinstance(prompt, str):
        raise TypeError(
            f"prompt: expected text, got {type(prompt).__name__} (generate takes tokens)"
        )
    tokens = tokens_of("prompt", prompt, tokenizer)
    if not tokens:
        raise ValueError("prompt: expected some text, got none")
    vocab_size = model.vocab_size
    ends = tokenizer.end_tokens if end_tokens is None else end_tokens
    ends = arguments.tokens("end_tokens", ends, vocab_size)
    stops = arguments.tokens("stop_tokens", stop_tokens, vocab_size)
    generation = generate(model, tokens, max_tokens, stop_tokens=stops | ends, **options)
    return GeneratedText(generation, decoder, ends - stops)


def tokens_of(argument: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text. Raises ValueError for characters that the tokenizer does not have."""
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError as error:
        message = f"{argument}: expected text that the tokenizer has, got {error}"
        raise ValueError(message) from error
