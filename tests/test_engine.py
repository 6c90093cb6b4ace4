"""The engine: sequences that join and leave, and write what each would write alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checkpoints import V, random_model
from torch import Tensor, nn

from torch_rwkv6 import generate
from torch_rwkv6.models import Engine, Penalties, Request, Sampling, Step
from torch_rwkv6.models.sampling import Counts, draw, probabilities
from torch_rwkv6.nn import RWKV, RWKVState

VERSIONS = ["4", "5.2", "6"]
SETTINGS: list[dict[str, Any]] = [  # of submit, each unlike the others
    {"sampling": Sampling(top_p=1.0)},
    {"sampling": Sampling(temperature=0.0)},
    {"sampling": Sampling(0.7, top_k=5, min_p=0.05)},
    {"sampling": Sampling(top_p=1.0), "penalties": Penalties(0.4, 0.3, 0.9, {2, 3})},
    {"sampling": Sampling(2.0, typical_p=0.6)},
    {"sampling": Sampling(top_p=0.9, logit_bias={1: 3.0, 7: -torch.inf}), "stop_tokens": [1, 4]},
]


def random_prompt(i: int, longest: int = 12) -> list[int]:
    generator = torch.Generator().manual_seed(100 + i)
    length = int(torch.randint(1, longest + 1, (), generator=generator))
    return torch.randint(V, (length,), generator=generator).tolist()


def run(engine: Engine) -> list[Step]:
    steps = []
    while engine.busy:
        steps += engine.step()
    return steps


@torch.no_grad()
def alone(model: RWKV, request: Request, seed: int) -> list[int]:
    """What is drawn for this request alone from the logits of `forward`."""
    generator, counts = torch.Generator().manual_seed(seed), Counts(request.penalties)
    tokens: list[int] = []
    piece, state = request.prompt, None
    while len(tokens) < request.max_tokens:
        logits, state = model(torch.tensor([piece]), state)
        logits = logits[:, -1]
        ids, loss = counts.penalties()
        logits[0, torch.from_numpy(ids)] -= torch.from_numpy(loss).float()
        for token, bias in request.sampling.logit_bias.items():
            logits[0, token] += bias
        token = int(draw(*probabilities(logits, request.sampling), [generator]))
        if token in request.stop_tokens:
            break
        tokens.append(token)
        counts.add(token)
        piece = [token]
    return tokens


@torch.no_grad()
def state_after(model: RWKV, tokens: Sequence[int]) -> RWKVState:
    state: RWKVState = model(torch.tensor([list(tokens)]))[1]
    return state


def assert_seen(model: RWKV, state: RWKVState | None, tokens: Sequence[int]) -> None:
    assert state is not None
    for found, expected in zip(state, state_after(model, tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def shapes_fed(model: RWKV) -> list[tuple[int, ...]]:
    """Filled with the shape of the tokens of every call."""
    shapes: list[tuple[int, ...]] = []
    model.emb.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


# ---- each writes what it would write alone


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("piece", [3, 512])
def test_sequences_that_join_and_leave(version: str, piece: int) -> None:
    model = random_model(version)
    engine = Engine(model, max_rows=4, piece=piece)
    requests: list[Request] = []
    steps: list[Step] = []
    for i in range(12):
        options = SETTINGS[i % len(SETTINGS)]
        requests.append(
            engine.submit(random_prompt(i), 1 + (5 * i) % 14, seed=i, keep_state=True, **options)
        )
        for _ in range(i % 3):
            steps += engine.step()
        assert engine.active <= 4
    steps += run(engine)
    assert not engine.busy
    for i, request in enumerate(requests):
        expected = alone(model, request, i)
        assert request.tokens == expected
        own = [step for step in steps if step.request is request]
        assert [step.token for step in own if step.token is not None] == expected
        assert [step.finish_reason for step in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == request.finish_reason
        stopped = request.stop_token is not None
        assert request.finish_reason == ("stop" if stopped else "length")
        assert stopped == (len(expected) < request.max_tokens)
        assert_seen(model, request.state, [*request.prompt, *request.tokens])
    assert {request.finish_reason for request in requests} == {"stop", "length"}


def test_generate_writes_what_the_engine_writes() -> None:
    model, prompts = random_model("6"), [random_prompt(i) for i in range(5)]
    engine = Engine(model, max_rows=2, piece=4)
    requests = [engine.submit(p, 9, seed=3 + b) for b, p in enumerate(prompts)]
    run(engine)
    found = torch.stack(list(generate(model, prompts, 9, seed=3)), 1)
    assert found.tolist() == [request.tokens for request in requests]


def test_more_rows_than_a_matrix_vector_product_takes() -> None:
    model = random_model("6")
    engine = Engine(model, max_rows=20)
    requests = [engine.submit(random_prompt(i), 6, seed=i) for i in range(20)]
    run(engine)
    for i in (0, 7, 19):
        assert requests[i].tokens == alone(model, requests[i], i)


# ---- the work of a step


def test_only_rows_at_work_are_computed_in_memory_that_stays() -> None:
    model = random_model("6")
    engine = Engine(model, max_rows=3)
    memory = [x.data_ptr() for x in engine.pool]
    fed = shapes_fed(model)
    for i, max_tokens in enumerate((2, 7, 4)):
        engine.submit([i, i + 1], max_tokens, seed=i)
    run(engine)
    # the last token of a sequence is fed to nobody, as its state was not asked for
    assert fed == [(3, 2), (3, 1), (2, 1), (2, 1), (1, 1), (1, 1), (1, 1)]
    assert memory == [x.data_ptr() for x in engine.pool]


@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_are_read_packed_in_pieces_while_others_are_written(version: str) -> None:
    model = random_model(version)
    engine = Engine(model, max_rows=4, piece=10)
    first = engine.submit([1, 2], 30, seed=0)
    engine.step()
    fed = shapes_fed(model)
    others = [engine.submit(list(range(n)), 2, seed=n) for n in (25, 4, 8)]
    written = 0
    while not all(request.tokens for request in others):
        steps = engine.step()
        written += 1
        assert steps[0].request is first  # it gets a token in every step
        assert steps[0].token is not None
    # the third call has the last 5 tokens of the first prompt, the second, and one of the third
    assert [shape for shape in fed if shape[1] > 1] == [(1, 10), (1, 10), (1, 10), (1, 7)]
    assert written == 4
    run(engine)
    for request, seed in zip((first, *others), (0, 25, 4, 8), strict=True):
        assert request.tokens == alone(model, request, seed)


def test_prompts_of_different_lengths_are_one_call_of_generate() -> None:
    model = random_model("6")
    fed = shapes_fed(model)
    next(generate(model, [[1, 2, 3], [4], [5, 6]], 1))
    assert fed == [(1, 6)]


def test_requests_wait_in_order() -> None:
    engine = Engine(random_model("6"), max_rows=2)
    requests = [engine.submit([i], 3, seed=i) for i in range(5)]
    assert (engine.waiting, engine.active) == (5, 0)
    engine.step()
    assert (engine.waiting, engine.active) == (3, 2)
    ended = [step.request for step in run(engine) if step.finish_reason]
    assert ended == requests
    assert engine.step() == []


# ---- ends


def test_cancelled_requests_leave_at_once() -> None:
    model = random_model("6")
    engine = Engine(model, max_rows=3, piece=4)
    going = engine.submit([1], 20, seed=1)
    written = engine.submit([2], 20, seed=2, keep_state=True)
    for _ in range(3):
        engine.step()
    read = engine.submit(list(range(9)), 20, seed=3, keep_state=True)
    engine.step()
    waiting = engine.submit([4], 20, seed=4)
    last = engine.submit([5], 5, seed=5)
    assert engine.waiting == 2
    for request in (written, read, waiting):
        engine.cancel(request)
        engine.cancel(request)  # no effect
        assert request.finish_reason == "cancelled"
    assert (engine.waiting, engine.active) == (1, 1)
    assert not any(step.request in (written, read, waiting) for step in run(engine))
    assert len(written.tokens) == 4
    assert_seen(model, written.state, [2, *written.tokens])
    assert read.state is None
    assert not read.tokens
    assert going.tokens == alone(model, going, 1)
    assert last.tokens == alone(model, last, 5)
    engine.cancel(going)
    assert going.finish_reason == "length"
    with pytest.raises(ValueError, match="request: expected one that was submitted to this engine"):
        engine.cancel(Engine(model).submit([1]))
    with pytest.raises(TypeError, match="request: expected one of submit, got NoneType"):
        engine.cancel(None)  # type: ignore[arg-type]


def test_no_tokens_at_all() -> None:
    model = random_model("6")
    engine = Engine(model)
    request = engine.submit([1, 2, 3], 0, keep_state=True)
    assert run(engine) == [Step(request, None, finish_reason="length")]
    assert_seen(model, request.state, [1, 2, 3])


def test_logits_that_are_nan_fail_their_request_only() -> None:
    for value in (torch.nan, torch.inf):
        model = random_model("6")
        with torch.no_grad():
            model.emb.weight[40] = value
        engine = Engine(model, max_rows=3, cache_bytes=10**6)
        banned = Sampling(top_p=1.0, logit_bias={40: -torch.inf})
        requests = [engine.submit([i], 8, seed=i, sampling=banned) for i in range(2)]
        engine.step()
        bad = engine.submit([3, 40], 8, sampling=banned)
        steps = run(engine)
        (step,) = (step for step in steps if step.request is bad)
        assert (step.token, step.finish_reason) == (None, "error")
        assert isinstance(bad.error, FloatingPointError)
        assert "logits: expected finite numbers, got NaN" in str(bad.error)
        assert "bfloat16" in str(bad.error)
        for i, request in enumerate(requests):
            assert request.error is None
            assert request.tokens == alone(model, request, i)
        # nothing of it is left behind in its row
        after = engine.submit([5], 8, seed=9, sampling=banned)
        run(engine)
        assert after.tokens == alone(model, after, 9)


def test_an_exception_of_the_model_ends_the_requests_of_that_call() -> None:
    model = random_model("6")
    calls: list[tuple[int, ...]] = []
    failing = -1

    def fail(module: nn.Module, args: tuple[Tensor]) -> None:
        calls.append(tuple(args[0].shape))
        if (args[0] == 40).any() or len(calls) == failing:
            raise MemoryError("too long")

    model.emb.register_forward_pre_hook(fail)
    banned = Sampling(top_p=1.0, logit_bias={40: -torch.inf})
    engine = Engine(model, max_rows=3)
    good = engine.submit([1], 8, seed=1, sampling=banned)
    engine.step()
    bad = engine.submit([3, 40], 8, sampling=banned)  # while its prompt is read
    (failed, step) = engine.step()
    assert failed == Step(bad, None, finish_reason="error")
    assert isinstance(bad.error, MemoryError)
    assert step.request is good
    other = engine.submit([5, 6], 8, seed=2, sampling=banned, keep_state=True, logprobs=1)
    engine.step()
    failing = len(calls) + 1  # while tokens are written
    assert {step.finish_reason for step in engine.step()} == {"error"}
    assert not engine.busy
    assert (len(good.tokens), len(other.tokens), len(other.logprobs)) == (3, 1, 1)
    assert other.state is None
    after = engine.submit([7], 4, seed=3, sampling=banned)
    run(engine)
    for request, seed in ((good, 1), (other, 2), (after, 3)):
        written = request.tokens
        assert written == alone(model, request, seed)[: len(written)]
    state = model.initial_state(1)
    for prompt in ([3, 40], [3]):  # while the prompt is read, and after a token has been drawn
        stream = generate(model, prompt, 8, state=state, logit_bias={40: 1000.0})
        with pytest.raises(MemoryError, match="too long"):
            next(stream)
    assert_seen(model, state, [3])


def test_generate_yields_the_rows_that_are_fine_before_it_raises() -> None:
    model, state = random_model("6"), random_model("6").initial_state(2)
    with torch.no_grad():
        model.emb.weight[40] = torch.nan
    stream = generate(model, [[1, 2], [40]], 5, seed=0, state=state)
    row, none = next(stream).tolist()
    assert none == -1
    with pytest.raises(FloatingPointError, match="logits: expected finite"):
        next(stream)
    assert_seen(model, state.select([0]), [1, 2, row])
    assert stream.finish_reasons == [None, "error"]


# ---- settings


def test_log_probabilities_are_of_the_model_as_it_is() -> None:
    model, prompt = random_model("6"), [3, 1, 4]
    engine = Engine(model, max_rows=3)
    options: dict[str, Any] = {"sampling": Sampling(1.5, logit_bias={2: 5.0}), "seed": 0}
    requests = [engine.submit(prompt, 6, logprobs=k, **options) for k in (None, 0, 3)]
    steps = [step for step in run(engine) if step.request is requests[2]]
    tokens = requests[0].tokens
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]]))[0][0, 2:-1]
    expected = torch.log_softmax(logits, 1)
    assert all(request.tokens == tokens for request in requests)
    assert requests[0].logprobs == requests[0].top_logprobs == []
    assert requests[1].top_logprobs == [[]] * 6
    for request in requests[1:]:
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.logprobs), chosen, rtol=1e-4, atol=1e-5)
    values, ids = expected.topk(3)
    for i, step in enumerate(steps):
        assert step.logprob == requests[2].logprobs[i]
        assert step.top_logprobs == requests[2].top_logprobs[i]
        assert [token for token, _ in step.top_logprobs] == ids[i].tolist()
        found = torch.tensor([value for _, value in step.top_logprobs])
        torch.testing.assert_close(found, values[i], rtol=1e-4, atol=1e-5)


def test_biases_and_bans() -> None:
    model = random_model("6")
    engine = Engine(model, max_rows=4)
    greedy = {"temperature": 0.0}
    free = engine.submit([1], 12, sampling=Sampling(**greedy))
    run(engine)
    banned = dict.fromkeys(free.tokens, -torch.inf)
    others = engine.submit([1], 12, sampling=Sampling(**greedy, logit_bias=banned))
    liked = engine.submit([1], 12, sampling=Sampling(logit_bias={9: 100.0}), seed=0)
    again = engine.submit([1], 12, sampling=Sampling(**greedy))
    nothing = engine.submit(
        [1], 12, sampling=Sampling(logit_bias=dict.fromkeys(range(V), -torch.inf))
    )
    run(engine)
    assert not set(others.tokens) & set(free.tokens)
    assert liked.tokens == [9] * 12
    assert again.tokens == free.tokens
    assert isinstance(nothing.error, FloatingPointError)


def test_processors_see_all_tokens_and_the_penalised_logits() -> None:
    model, prompt = random_model("6"), [3, 1, 4]
    seen: list[tuple[list[int], Tensor]] = []

    def watch(tokens: Tensor, logits: Tensor) -> Tensor:
        assert (tokens.dtype, logits.dtype) == (torch.int64, torch.float32)
        seen.append((tokens[0].tolist(), logits[0].clone()))
        return logits

    def only(token: int) -> Callable[[Tensor, Tensor], Tensor]:
        def processor(_: Tensor, logits: Tensor) -> Tensor:
            keep = torch.zeros_like(logits, dtype=torch.bool)
            keep[:, token] = True
            return logits.masked_fill_(~keep, -torch.inf)

        return processor

    engine = Engine(model, max_rows=2)
    other = engine.submit([7], 4, seed=1)
    request = engine.submit(
        prompt, 4, penalties=Penalties(0.5, 0.25, 1.0), processors=[watch, only(8)]
    )
    run(engine)
    assert request.tokens == [8] * 4
    assert other.tokens == alone(model, other, 1)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, 8, 8, 8]]))[0][0, 2:]
    for n, ((tokens, found), expected) in enumerate(zip(seen, logits, strict=True)):
        assert tokens == [*prompt, *[8] * n]
        expected[8] -= 0.5 + 0.25 * n if n else 0.0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_processor_that_fails_ends_its_request_only() -> None:
    def fail(tokens: Tensor, logits: Tensor) -> Tensor:
        raise LookupError("no such thing")

    model = random_model("6")
    engine = Engine(model, max_rows=2)
    bad = engine.submit([1], 5, processors=[fail])
    good = engine.submit([2], 5, seed=2)
    run(engine)
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, LookupError)
    assert good.tokens == alone(model, good, 2)
    with pytest.raises(LookupError, match="no such thing"):
        next(generate(model, [1], processors=[fail]))


def test_requests_that_do_not_fit() -> None:
    model = random_model("6")
    engine = Engine(model)
    for options, error, message in (
        ({"prompt": []}, ValueError, "prompt: expected at least one"),
        ({"prompt": [[1], [2]]}, ValueError, "prompt: expected one sequence, got 2"),
        ({"prompt": [V]}, IndexError, f"prompt: expected tokens from 0 to {V - 1}"),
        ({"prompt": "text"}, TypeError, "prompt: expected token ids"),
        ({"max_tokens": -1}, ValueError, "max_tokens: expected 0 or more"),
        ({"sampling": {}}, TypeError, "sampling: expected a Sampling, got dict"),
        ({"penalties": 0.2}, TypeError, "penalties: expected a Penalties, got float"),
        ({"penalties": Penalties(free_tokens=[V])}, IndexError, "free_tokens: expected tokens"),
        ({"sampling": Sampling(logit_bias={V: 1})}, IndexError, "logit_bias: expected tokens"),
        ({"stop_tokens": [V]}, IndexError, "stop_tokens: expected tokens"),
        ({"seed": -1}, ValueError, "seed: expected 0 to"),
        ({"logprobs": -1}, ValueError, "logprobs: expected 0 or more"),
        ({"logprobs": True}, TypeError, "logprobs: expected an integer"),
        ({"processors": 3}, TypeError, "processors: expected a list of callables, got int"),
        ({"processors": ["a"]}, TypeError, "processors: expected callables, got 'a'"),
        ({"state": model.initial_state(2)}, ValueError, "state: expected 1 rows, one per prompt"),
        ({"keep_state": 1}, TypeError, "keep_state: expected True or False"),
    ):
        with pytest.raises(error, match=message):
            engine.submit(**{"prompt": [1]} | options)
    assert not engine.busy
    for options, error, message in (
        ({"max_rows": 0}, ValueError, "max_rows: expected 1 or more"),
        ({"piece": 0}, ValueError, "piece: expected 1 or more"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes: expected 0 or more"),
        ({"compiled": 1}, TypeError, "compiled: expected"),
    ):
        with pytest.raises(error, match=message):
            Engine(model, **options)
    with pytest.raises(TypeError, match="model: expected an RWKV, got Linear"):
        Engine(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="temprature: there is no such setting; expected one of te"):
        generate(model, [1], temprature=1.0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_engine_works_in_every_mode(mode: Callable[[], Any]) -> None:
    model = random_model("6")
    expected = alone(model, Engine(model).submit([1, 2], 6), 0)
    with mode():
        engine = Engine(model, max_rows=2)
        request = engine.submit([1, 2], 6, seed=0)
        other = engine.submit([3], 3, seed=1)
        engine.step()
    run(engine)
    assert request.tokens == expected
    assert other.tokens == alone(model, other, 1)


# ---- states


def test_a_state_to_go_on_from_is_not_changed() -> None:
    model = random_model("6")
    engine = Engine(model, max_rows=2, cache_bytes=10**6)
    engine.submit([3, 4], 1)  # in the cache, without the state
    run(engine)
    state = state_after(model, [1, 2])
    before = state.clone()
    request = engine.submit([3, 4], 5, seed=0, state=state, keep_state=True)
    run(engine)
    assert all(map(torch.equal, state, before))
    whole = engine.submit([1, 2, 3, 4], 5, seed=0)
    run(engine)
    assert request.tokens == whole.tokens
    assert request.cached_tokens == whole.cached_tokens == 0
    assert_seen(model, request.state, [1, 2, 3, 4, *request.tokens])


# ---- the prefix cache


def cached_engine(model: RWKV, states: float = 100.0, **options: Any) -> Engine:
    state = model.initial_state(1)
    size = sum(x.numel() * x.element_size() for x in state) + V * 4
    return Engine(model, cache_bytes=int(states * size), **options)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_conversation_goes_on_from_the_cache(version: str) -> None:
    model = random_model(version)
    engine = cached_engine(model)
    fed = shapes_fed(model)
    text, known = list(range(20)), 0
    for turn in range(3):
        request = engine.submit(text, 6, seed=turn)
        run(engine)
        assert request.tokens == alone(model, request, turn)
        text += [*request.tokens, turn, turn + 1]
        assert request.cached_tokens == known
        known = len(request.prompt) + 5
    # the answer's last token, which had not been fed, and the two that are new
    assert [shape[1] for shape in fed if shape[1] > 1].count(3) == 2


def test_a_prompt_that_was_read_before_is_not_read_again() -> None:
    model = random_model("6")
    engine = cached_engine(model)
    first = engine.submit([1, 2, 3], 5, seed=0)
    run(engine)
    fed = shapes_fed(model)
    other = engine.submit([1, 2, 3], 5, seed=0)
    run(engine)
    assert other.tokens == first.tokens
    assert other.cached_tokens == 3
    assert fed == [(1, 1)] * 4


def test_where_prompts_part_a_state_is_kept() -> None:
    """A long beginning that many prompts share is read twice, not each time."""
    model, common = random_model("6"), list(range(30))
    engine = cached_engine(model)
    found = []
    for i in range(3):
        request = engine.submit([*common, 35 + i], 3, seed=i)
        run(engine)
        assert request.tokens == alone(model, request, i)
        found.append(request.cached_tokens)
    assert found == [0, 0, 30]
    # where they share few tokens, that is not worth a state
    for i in range(3):
        request = engine.submit([39, 38, 37 - i], 1)
        run(engine)
        assert request.cached_tokens == 0


def test_the_cache_is_bounded_and_forgets_the_least_recently_used() -> None:
    model = random_model("6")
    engine = cached_engine(model, 2.5)
    for prompt in ([1], [2], [1], [3]):
        engine.submit(prompt, 0)
        run(engine)
        assert engine.cache.bytes <= engine.cache.max_bytes
    assert len(engine.cache) == 2
    found = []
    for prompt in ([1], [3], [2]):
        request = engine.submit(prompt, 0)
        run(engine)
        found.append(request.cached_tokens)
    assert found == [1, 1, 0]
    engine.cache.clear()
    assert (len(engine.cache), engine.cache.bytes) == (0, 0)
    for small in (cached_engine(model, 0.9), Engine(model)):
        small.submit([1], 3)
        run(small)
        assert len(small.cache) == 0
