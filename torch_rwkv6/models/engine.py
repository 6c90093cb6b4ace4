"""Many sequences at once: they join and leave between steps; each writes what it would alone."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_rwkv6 import arguments
from torch_rwkv6.models.prefix_cache import Cached, PrefixCache
from torch_rwkv6.models.sampling import (
    Counts,
    Penalties,
    Sampler,
    Sampling,
    draw,
    log_probabilities,
    unusable,
)
from torch_rwkv6.nn import RWKV, RWKVState
from torch_rwkv6.nn.sharded import device_of

__all__ = ["Engine", "Request", "Step"]

Prompt: TypeAlias = "Tensor | npt.NDArray[Any] | Sequence[int] | Sequence[Sequence[int]]"
Processor: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # tokens [1, T], logits [1, V] -> [1, V]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled", "error"]

PIECE = 512  # tokens of prompts at a time: more are no faster
WORTH = 16  # tokens that two prompts share from which on the state after them is kept


@dataclass(eq=False)
class Request:
    """A sequence that an `Engine` writes: what was asked for, and what has come of it so far.

    Made by `Engine.submit`; the engine alone changes it.

    Attributes:
        prompt: the tokens to go on from.
        max_tokens, sampling, penalties, stop_tokens, processors, keep_state: as submitted.
        tokens: those written so far; a stop token is not among them.
        logprobs: of each token in `tokens`, where they were asked for.
        top_logprobs: of the likeliest tokens in the place of each of `tokens`: pairs of a token and
            its log-probability, likeliest first.
        finish_reason: None until it has ended; then "stop" (a stop token), "length" (max_tokens),
            "cancelled" or "error".
        stop_token: the one that ended it.
        error: what ended it: a FloatingPointError for logits from which no token can be drawn, or
            whatever the model or a processor raised.
        state: with keep_state, once it has ended: one row, which has seen exactly the prompt and
            `tokens`. None if it ended before its prompt was read, or because the model raised.
        cached_tokens: how many of the prompt's tokens were not read but found in the cache.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    penalties: Penalties
    stop_tokens: frozenset[int]
    processors: tuple[Processor, ...]
    top: int | None  # how many of the likeliest tokens' log-probabilities are wanted
    keep_state: bool
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: Exception | None = None
    state: RWKVState | None = None
    cached_tokens: int = 0


class Step(NamedTuple):
    """What a step of an `Engine` did for one request.

    At a stop token or an error, and where max_tokens is 0, there is no token.
    """

    request: Request
    token: int | None
    logprob: float | None = None  # of the token, where it was asked for
    top_logprobs: Sequence[tuple[int, float]] = ()
    finish_reason: FinishReason | None = None  # None: the request goes on


class _Row:
    """A request while the engine works on it."""

    def __init__(self, request: Request, generator: torch.Generator, own: RWKVState | None) -> None:
        self.request, self.generator = request, generator
        self.cacheable = own is None  # otherwise the state has seen more than the request's tokens
        self.own = own  # its state of one row, until it joins the pool
        self.logits: Tensor | None = None  # [1, V], when the prompt has been read
        self.read = 0  # tokens of the prompt
        self.branch = 0  # where another text parts from the prompt
        self.fed = 0  # of the tokens written, how many the state has seen
        settings = request.penalties
        penalised = settings.alpha_presence != 0 or settings.alpha_frequency != 0
        self.counts = Counts(settings) if penalised else None
        bias = request.sampling.logit_bias
        self.bias = (np.array(list(bias), np.int64), np.array(list(bias.values()), np.float64))

    @property
    def seen(self) -> list[int]:
        """The tokens that its state has seen."""
        return [*self.request.prompt[: self.read], *self.request.tokens[: self.fed]]


def _failed(request: Request, error: Exception) -> Step:
    request.error, request.finish_reason = error, "error"
    return Step(request, None, finish_reason="error")


class Engine:
    """Continuous batching: writes many sequences at once, which join and leave between steps.

    ::

        engine = Engine(model, max_rows=8)
        engine.submit([5, 17], max_tokens=20, seed=0)
        engine.submit([33155], max_tokens=100, sampling=Sampling(temperature=0))
        while engine.busy:
            for step in engine.step():
                print(step.request.prompt, step.token, step.finish_reason)

    The states of the rows lie in one pool that is allocated once, and are updated in place. The
    rows at work are always its first ones, so that a step is one call of ``model.forward_`` on a
    view; a row that has ended is filled by the last one.

    Every request has its own settings, seed, stops and random numbers, and writes what it would
    write alone. (Up to rounding: logits may differ in their last digits between batch sizes, and
    between a prompt that is read in one piece and one read in several.)

    An engine is not thread-safe: all its methods must be called from one thread at a time. What
    serves several threads has one thread of its own for the engine, and a queue to it.

    An exception that the model raises ends the requests that were in that call, with it as their
    ``error``; the engine goes on with the others.

    Args:
        model: of any version.
        max_rows: how many sequences are worked on at once; others wait, in the order they came.
        piece: how many tokens of prompts are read in a step, at most. No sequence waits longer for
            its next token than this many take.
        cache_bytes: memory for the **prefix cache**: the states after prompts and answers, and
            after beginnings of 16 tokens or more that prompts share, from which later prompts that
            begin with them go on. The least recently used are forgotten. 0 is no cache.
        compiled: runs the decoding step through torch.compile, of its default backend (True), or
            of the one named. It compiles anew when the number of rows changes.
        pool: memory for the states, of max_rows rows, instead of the engine's own: `generate`
            lends its caller's. Before a row is moved in it, the engine takes a copy instead.

    Attributes:
        cache: the prefix cache; ``cache.clear()`` when the model's weights have changed.
        pool: the states of the rows.
        device: where the model takes its tokens.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """

    def __init__(
        self,
        model: RWKV,
        *,
        max_rows: int = 8,
        piece: int = PIECE,
        cache_bytes: int = 0,
        compiled: bool | str = False,
        pool: RWKVState | None = None,
    ) -> None:
        check_model(model)
        self.model = model
        self.max_rows = arguments.integer("max_rows", max_rows, 1)
        self.piece = arguments.integer("piece", piece, 1)
        self.cache = PrefixCache(cache_bytes)
        if not isinstance(compiled, (bool, str)):
            raise TypeError(f"compiled: expected a bool or a backend's name, got {compiled!r}")
        self._step: Callable[[Tensor, RWKVState], Tensor] = model.forward_
        if compiled:
            backend = "inductor" if compiled is True else compiled
            self._step = torch.compile(self._step, backend=backend)
        self.device = device_of(model.ln_out.weight)
        # A state made in inference mode can be updated in that mode only.
        self._inference = pool is not None and any(x.is_inference() for x in pool)
        self._lent = pool is not None  # by a caller, who knows which row is whose
        with self._mode():
            self.pool = model.initial_state(self.max_rows) if pool is None else pool
        self._waiting: deque[_Row] = deque()
        self._reading: list[_Row] = []
        self._rows: list[_Row] = []  # at work: row i has the state pool[:, i]
        self._logits = torch.empty(0, device=self.device)  # [n, V] of the rows at work
        self._sampler: Sampler | None = None  # of the rows at work

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._rows or self._reading or self._waiting)

    @property
    def waiting(self) -> int:
        """How many requests have no row yet."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """How many requests have a row, that is, are being read or written."""
        return len(self._reading) + len(self._rows)

    def submit(
        self,
        prompt: Tensor | npt.NDArray[Any] | Sequence[int],  # [T]
        max_tokens: int = 100,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008  it is frozen
        penalties: Penalties = Penalties(),  # noqa: B008
        stop_tokens: Collection[int] = (),
        seed: int | None = None,
        logprobs: int | None = None,
        processors: Sequence[Processor] = (),
        state: RWKVState | None = None,
        keep_state: bool = False,
    ) -> Request:
        """A sequence to write, which begins with the next `step` that has a row for it.

        Args:
            prompt: at least one token id.
            max_tokens: how many tokens to write.
            sampling, penalties: how they are drawn.
            stop_tokens: the sequence ends before the first of these.
            seed: from 0 to 2**64 - 1: the same seed gives the same tokens; None is a new one.
            logprobs: log-probabilities of the tokens written and, in the place of each, of so many
                of the likeliest, in the softmax of the model's logits as they are; 0 is those of
                the tokens written alone, None is none.
            processors: are called one after another with all tokens so far, [1, T] int64, and the
                logits, [1, V] float32, after penalties and biases, and return logits: such as the
                LogitsProcessor of transformers.
            state: one row to go on from, which is not changed; None is the start of a sequence.
                Such a request does not use the cache.
            keep_state: leaves its state in `Request.state`.

        Raises:
            TypeError, ValueError: an argument of the wrong type or out of range; a state that is
                not this model's.
            IndexError: a token that the vocabulary does not have.
        """
        vocab_size = self.model.vocab_size
        rows = rows_of(prompt, vocab_size)
        if len(rows) > 1:
            raise ValueError(f"prompt: expected one sequence, got {len(rows)}")
        for name, value, kind in (
            ("sampling", sampling, Sampling),
            ("penalties", penalties, Penalties),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
        arguments.tokens("free_tokens", penalties.free_tokens, vocab_size)
        arguments.tokens("logit_bias", sampling.logit_bias, vocab_size)
        if isinstance(processors, str) or not isinstance(processors, Sequence):
            raise TypeError(
                f"processors: expected a list of callables, got {type(processors).__name__}"
            )
        for processor in processors:
            if not callable(processor):
                raise TypeError(f"processors: expected callables, got {processor!r}")
        if seed is None:
            seed = new_seed()
        seed = arguments.integer("seed", seed, 0, 2**64 - 1)
        if state is not None:
            check_state(self.model, state, 1)
        request = Request(
            rows[0],
            arguments.integer("max_tokens", max_tokens, 0),
            sampling,
            penalties,
            frozenset(arguments.tokens("stop_tokens", stop_tokens, vocab_size)),
            tuple(processors),
            None if logprobs is None else arguments.integer("logprobs", logprobs, 0),
            arguments.flag("keep_state", keep_state),
        )
        with self._mode():
            own = None if state is None else state.clone()
        self._waiting.append(_Row(request, torch.Generator("cpu").manual_seed(seed), own))
        return request

    def step(self) -> list[Step]:
        """Reads a piece of the prompts, and writes a token of every sequence whose prompt is read.

        Afterwards the state of each row has seen exactly its prompt and the tokens written.

        Returns:
            what was done for each request that got a token or has ended.
        """
        with self._mode():
            self._admit()
            failed = self._read() if self._reading else []
            return failed + self._write() if self._rows else failed

    def read_prompts(self) -> None:
        """Reads all prompts that have a row to their ends, so that all are written side by side."""
        with self._mode():
            self._admit()
            while self._reading:
                self._read()

    def cancel(self, request: Request) -> None:
        """Ends a request at once; nothing happens if it has ended.

        Raises:
            TypeError: no request.
            ValueError: the request is not this engine's.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request: expected one of submit, got {type(request).__name__}")
        if request.finish_reason is not None:
            return
        for rows in (self._waiting, self._reading, self._rows):
            for i, row in enumerate(rows):
                if row.request is request:
                    request.finish_reason = "cancelled"
                    if rows is self._rows:
                        with self._mode():
                            self._leave(i)
                    else:
                        del rows[i]
                    return
        raise ValueError("request: expected one that was submitted to this engine")

    def write_states(self, state: RWKVState, places: Mapping[Request, int]) -> None:
        """Writes the states of requests to their places among the rows of another state.

        Of all requests at work, and of those that have ended and kept theirs.
        """
        with self._mode():
            rows = [places[row.request] for row in self._rows]
            for x, own in zip(state, self._first(len(rows)), strict=True):
                x[:, rows] = own
            for request, place in places.items():
                if request.state is not None:
                    for x, own in zip(state, request.state, strict=True):
                        x[:, place] = own[:, 0]

    # ---- prompts

    def _admit(self) -> None:
        """Gives rows to those who wait."""
        while self._waiting and self.active < self.max_rows:
            row = self._waiting.popleft()
            if row.cacheable and self.cache.max_bytes:
                row.read, cached, shared = self.cache.find(row.request.prompt)
                row.request.cached_tokens = row.read
                row.branch = shared if shared - row.read >= WORTH else 0
                if cached is not None:
                    row.own = cached.state.clone()
                    row.logits = cached.logits if row.read == len(row.request.prompt) else None
            if row.own is None:
                row.own = self.model.initial_state(1)
            self._reading.append(row)

    def _read(self) -> list[Step]:
        """Reads a piece of the prompts, first come, first served; says which ones failed."""
        budget, pieces = self.piece, []
        for row in self._reading:
            prompt = row.request.prompt
            end = min(row.read + budget, len(prompt))
            if row.read < row.branch < end:
                end = row.branch
            if row.read < end:
                pieces.append((row, prompt[row.read : end]))
                budget -= end - row.read
        failed = self._read_pieces(pieces) if pieces else []
        for row in [row for row in self._reading if row.logits is not None]:
            self._join(row)
        return failed

    def _read_pieces(self, pieces: list[tuple[_Row, list[int]]]) -> list[Step]:
        """Reads a piece of each of these prompts, in one pass."""
        rows = [row for row, _ in pieces]
        state = RWKVState.cat([row.own for row in rows if row.own is not None])
        try:
            logits = read_packed(self.model, [tokens for _, tokens in pieces], state)
        except Exception as error:
            self._reading = [row for row in self._reading if row not in rows]
            return [_failed(row.request, error) for row in rows]
        for i, (row, tokens) in enumerate(pieces):
            row.own = state.row(i)
            row.read += len(tokens)
            done = row.read == len(row.request.prompt)
            if done:
                row.logits = logits[i : i + 1]
            if row.cacheable and (done or row.read == row.branch):
                self.cache.put(row.seen, Cached(row.own, logits[i : i + 1]))
        return []

    # ---- rows at work

    def _join(self, row: _Row) -> None:
        """Takes a row whose prompt has been read into the batch."""
        self._reading.remove(row)
        assert row.own is not None
        assert row.logits is not None
        for x, own in zip(self.pool, row.own, strict=True):
            x[:, len(self._rows)] = own[:, 0]
        self._logits = torch.cat((self._logits, row.logits)) if self._rows else row.logits.clone()
        row.own = row.logits = None
        self._rows.append(row)
        self._sampler = None

    def _leave(self, i: int) -> None:
        """Takes row i out of the batch; the last one fills its place."""
        row, last = self._rows[i], len(self._rows) - 1
        own = self.pool.row(i)
        if row.request.keep_state:
            row.request.state = own.clone()
        if row.cacheable and row.request.error is None:
            self.cache.put(row.seen, Cached(own, self._logits[i : i + 1]))
        if i < last:
            if self._lent:
                self.pool, self._lent = self.pool.clone(), False
            for x in self.pool:
                x[:, i] = x[:, last]
            self._logits[i] = self._logits[last]
            self._rows[i] = self._rows[last]
        self._rows.pop()
        self._logits = self._logits[:last]
        self._sampler = None

    def _write(self) -> list[Step]:
        """A token for every row at work."""
        steps = self._choose()
        # A row that ends is fed its last token only where its state is wanted
        unfed = [s.token is None or not (s.finish_reason is None or s.request.keep_state)
                 for s in steps]  # fmt: skip
        for i in reversed(range(len(steps))):
            if unfed[i]:
                self._leave(i)
        if self._rows:
            last = [row.request.tokens[-1:] for row in self._rows]
            tokens = torch.tensor(last, dtype=torch.int64, device=self.device)  # [n, 1]
            try:
                self._logits = self._step(tokens, self._first(len(last)))
            except Exception as error:
                return self._fail(steps, error)
            for i in reversed(range(len(self._rows))):
                row = self._rows[i]
                row.fed += 1
                if row.request.finish_reason is not None:
                    self._leave(i)
        return steps

    def _fail(self, steps: list[Step], error: Exception) -> list[Step]:
        """Ends all rows at work, whose states have not seen the tokens of these steps."""
        failed = {}
        for row in self._rows:
            request = row.request
            for values in (request.tokens, request.logprobs, request.top_logprobs):
                del values[row.fed :]
            failed[request] = _failed(request, error)
        self._rows, self._sampler = [], None
        return [failed.get(step.request, step) for step in steps]

    def _first(self, n: int) -> RWKVState:
        return self.pool if n == self.max_rows else RWKVState(*(x[:, :n] for x in self.pool))

    def _choose(self) -> list[Step]:
        """Draws a token for every row, and says which rows end with it."""
        if self._sampler is None:
            self._sampler = Sampler([row.request.sampling for row in self._rows])
        logits = self._processed()
        p, tokens = self._sampler(logits)
        drawn = draw(p, tokens, [row.generator for row in self._rows])
        failed = [x != x for x in p[:, 0].tolist()]  # NaN
        wanted = [row.request.top for row in self._rows if row.request.top is not None]
        if wanted:
            logprobs, top_logprobs = log_probabilities(self._logits, drawn, max(wanted))
        steps = []
        for i, (row, token) in enumerate(zip(self._rows, drawn.tolist(), strict=True)):
            request = row.request
            if request.error is None and failed[i]:
                request.error = unusable(logits[i])
            if request.error is not None:
                request.finish_reason = "error"
            elif len(request.tokens) == request.max_tokens:  # of 0
                request.finish_reason = "length"
            elif token in request.stop_tokens:
                request.finish_reason, request.stop_token = "stop", token
            else:
                request.tokens.append(token)
                if row.counts is not None:
                    row.counts.add(token)
                if len(request.tokens) == request.max_tokens:
                    request.finish_reason = "length"
                step = Step(request, token, finish_reason=request.finish_reason)
                if request.top is not None:
                    request.logprobs.append(logprobs[i])
                    request.top_logprobs.append(top_logprobs[i][: request.top])
                    step = step._replace(logprob=logprobs[i], top_logprobs=request.top_logprobs[-1])
                steps.append(step)
                continue
            steps.append(Step(request, None, finish_reason=request.finish_reason))
        return steps

    def _processed(self) -> Tensor:  # [n, V]
        """The logits after penalties, biases and processors. A processor may fail its request."""
        changes = []  # rows, tokens and what is added
        for i, row in enumerate(self._rows):
            if row.counts is not None:
                tokens, loss = row.counts.penalties()
                changes.append((np.full(len(tokens), i), tokens, -loss))
            if len(row.bias[0]):
                changes.append((np.full(len(row.bias[0]), i), *row.bias))
        processed = any(row.request.processors for row in self._rows)
        if not changes and not processed:
            return self._logits
        logits = self._logits.to(torch.float32, copy=True)
        if changes:
            rows, ids, values = (
                torch.from_numpy(np.concatenate(x)).to(self.device)
                for x in zip(*changes, strict=True)
            )
            logits.index_put_((rows, ids), values.float(), accumulate=True)
        for i, row in enumerate(self._rows if processed else ()):
            request = row.request
            if request.processors:
                all_tokens = [*request.prompt, *request.tokens]
                ids = torch.tensor([all_tokens], dtype=torch.int64, device=self.device)
                try:
                    for processor in request.processors:
                        logits[i : i + 1] = processor(ids, logits[i : i + 1].clone())
                except Exception as error:  # whatever it raises is its request's matter
                    request.error = error
        return logits

    def _mode(self) -> Any:
        return _Mode(self._inference)


class _Mode:
    """No gradients; and inference mode exactly where the pool was made in it."""

    def __init__(self, inference: bool) -> None:
        self._inference, self._grad = torch.inference_mode(inference), torch.no_grad()

    def __enter__(self) -> None:
        self._inference.__enter__()
        self._grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._grad.__exit__(*error)
        self._inference.__exit__(*error)


def read_packed(
    model: RWKV,
    prompts: list[list[int]],  # B of T tokens each
    state: RWKVState,  # updated in place
) -> Tensor:  # [B, V]
    """Logits after a piece of each prompt: a batch where their lengths are equal."""
    options: dict[str, Any] = {"dtype": torch.int64, "device": device_of(model.ln_out.weight)}
    lengths = [len(tokens) for tokens in prompts]
    if len(set(lengths)) == 1:
        return model.forward_(torch.tensor(prompts, **options), state)
    tokens = torch.tensor([list(itertools.chain(*prompts))], **options)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], **options)
    return model.forward_(tokens, state, ends)


def new_seed() -> int:
    """A seed of torch's own generator."""
    return int(torch.randint(2**31, (), dtype=torch.int64, device="cpu").item())


def check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "forward_"):
        raise TypeError(f"model: expected an RWKV, got {type(model).__name__}")


def check_state(model: RWKV, state: RWKVState, rows: int) -> None:
    """Raises TypeError or ValueError where a sequence of the model cannot go on from the state."""
    if not isinstance(state, RWKVState):
        raise TypeError(f"state: expected an RWKVState, got {type(state).__name__}")
    found = {x.shape[1] for x in state if isinstance(x, Tensor) and x.dim() > 1}
    if len(found) == 1 and found != {rows}:
        raise ValueError(
            f"state: expected {rows} rows, one per prompt, got {found.pop()} "
            "(RWKVState.select repeats)"
        )
    model.check_state(state, rows)
    for name, x, own in zip(RWKVState._fields, state, model.initial_state(0), strict=True):
        if x.dtype != own.dtype:
            raise TypeError(
                f"state.{name}: expected {own.dtype}, got {x.dtype} (RWKVState.to converts)"
            )
    state.check_memory()


def rows_of(prompt: Prompt, vocab_size: int) -> list[list[int]]:
    """The prompts, each of at least one token.

    Raises:
        TypeError, ValueError: no token ids, or none.
        IndexError: a token that the vocabulary does not have.
    """
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
    values: Any = prompt.tolist() if isinstance(prompt, (Tensor, np.ndarray)) else prompt
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            f"prompt: expected token ids, got {type(prompt).__name__} (generate_text takes text)"
        )
    are_rows = [_is_row(value) for value in values]
    if any(are_rows) and not all(are_rows):
        raise TypeError("prompt: expected token ids or lists of them, got both in one list")
    if values and not any(are_rows):
        values = [values]
    rows = [[arguments.token("prompt", t, vocab_size) for t in row] for row in values]
    if not rows or not all(rows):
        raise ValueError("prompt: expected at least one sequence of at least one token")
    return rows


def _is_row(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Sequence)
