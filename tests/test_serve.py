"""examples/serve.py, as OpenAI's own client, raw connections and a browser meet it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from one_line import assert_refused

openai = pytest.importorskip("openai", reason="the client that the server is tested with")
pytest.importorskip("uvicorn", reason="the server needs torch_rwkv6[serve]")
pytest.importorskip("starlette", reason="the server needs torch_rwkv6[serve]")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # as running a script does
import openai_forms  # noqa: E402
import serve  # noqa: E402

from torch_rwkv6.models import generate_text, load, load_tokenizer, save  # noqa: E402
from torch_rwkv6.models.chat import TEMPLATES  # noqa: E402

LIMIT = 60  # seconds, after which something hangs, however busy the machine
KEY = "sesame"
ROWS, WAITING = 8, 24
TOKENIZER = load_tokenizer("bytes")
BROKEN = 255  # a token of whose embedding the model makes NaN


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of the King James Bible, with one broken token."""
    model = load(ROOT / "tests" / "data" / "rwkv6-kjv.pth", dtype=torch.float32)
    with torch.no_grad():
        model.emb.weight[BROKEN] = torch.nan
    path = tmp_path_factory.mktemp("model") / "kjv.safetensors"
    save(model, path)
    return str(path)


@pytest.fixture(scope="module")
def model(checkpoint: str) -> Any:
    return load(checkpoint).eval()


@contextlib.contextmanager
def running(checkpoint: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RWKV_API_KEY": KEY}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "serve.py"), checkpoint, "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        name, _, url = process.stdout.readline().strip().partition(": ")
        assert name == "kjv", process.communicate(timeout=LIMIT)[1]
        yield process, url
    finally:
        process.kill()
        process.communicate(timeout=LIMIT)


@pytest.fixture(scope="module")
def url(checkpoint: str) -> Iterator[str]:
    options = ("--rows", str(ROWS), "--queue", str(WAITING), "--max-prompt", "2000")
    with running(checkpoint, *options, "--max-tokens", str(10**9)) as (_, url):
        yield url


def client_of(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=LIMIT, max_retries=0)


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return client_of(url)


def expected(model: Any, prompt: str, tokens: int, **options: Any) -> str:
    """What the model writes alone, without a server."""
    settings = {"temperature": 1.0, "top_p": 1.0, "seed": 0} | options
    return "".join(generate_text(model, TOKENIZER, prompt, tokens, **settings))


def complete(client: Any, prompt: Any, tokens: int = 20, **options: Any) -> Any:
    settings = {"temperature": 1.0, "top_p": 1.0, "seed": 0} | options
    return client.completions.create(model="kjv", prompt=prompt, max_tokens=tokens, **settings)


def ask(client: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    settings = {"max_tokens": 20, "seed": 0} | options
    return client.chat.completions.create(model="kjv", messages=messages, **settings)


def health(url: str) -> dict[str, Any]:
    status, _, body = fetch(url, "GET", "/health")
    assert status == 200
    return json.loads(body)


def fetch(
    url: str, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LIMIT)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    with contextlib.closing(connection):
        return response.status, response.headers, response.read()


def wait_for_room(url: str) -> None:
    """Until nothing is being written."""
    end = time.monotonic() + LIMIT
    while health(url)["texts"]:
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- texts


def test_models(client: Any) -> None:
    (found,) = client.models.list()
    assert found.id == "kjv"
    assert client.models.retrieve("kjv").id == "kjv"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here, but 'kjv'"):
        client.models.retrieve("gpt")


def test_a_completion_is_what_the_model_writes_alone(client: Any, model: Any) -> None:
    found = complete(client, "And God said", 30)
    assert found.object == "text_completion"
    (choice,) = found.choices
    assert choice.text == expected(model, "And God said", 30)
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (12, 30)
    assert found.usage.total_tokens == 42
    again = complete(client, "And God said", 30)
    assert again.choices[0].text == choice.text
    assert again.usage.prompt_tokens_details.cached_tokens == 12
    assert complete(client, "And God said", 30, seed=1).choices[0].text != choice.text
    assert len(complete(client, "And God said", None).choices[0].text) == 16  # OpenAI's default


def test_settings_reach_the_model(client: Any, model: Any) -> None:
    for asked, own in (
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"alpha_presence": 1.5, "alpha_frequency": 0.5, "alpha_decay": 1.0},
        ),
        ({"logit_bias": {"101": -100, "32": 5}}, {"logit_bias": {101: -100, 32: 5}}),
        ({"extra_body": {"top_k": 3}}, {"top_k": 3}),
        ({"extra_body": {"min_p": 0.3}}, {"min_p": 0.3}),
    ):
        found = complete(client, "In the", 20, **asked).choices[0].text
        assert found == expected(model, "In the", 20, **own), asked
    defaults = ("temperature", "top_p", "n", "stop", "logit_bias", "presence_penalty", "stream")
    nulls = complete(client, "In the", 20, **dict.fromkeys(defaults), extra_body={"suffix": None})
    assert nulls.choices[0].text == expected(model, "In the", 20)
    biased = complete(client, "In the", 60, logit_bias={"101": -100}).choices[0].text
    assert "e" not in biased
    seeds = {complete(client, "In the", 40, seed=None).choices[0].text for _ in range(3)}
    assert len(seeds) == 3


def test_several_texts_in_one_request(client: Any, model: Any) -> None:
    found = complete(client, ["In", "The"], 10, n=2, seed=5)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    texts = [expected(model, p, 10, seed=s) for p in ("In", "The") for s in (5, 6)]
    assert [choice.text for choice in found.choices] == texts
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (5, 40)
    for prompt in (list(b"In"), [list(b"In")], "In"):
        assert complete(client, prompt, 10, seed=5).choices[0].text == texts[0]


def test_a_stream_is_the_whole_in_pieces(client: Any, model: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = complete(client, "And God said", 30, **options)
    texts = [event.choices[0].text for event in events]
    assert "".join(texts) == expected(model, "And God said", 30)
    assert len(texts) == 30
    assert [event.choices[0].finish_reason for event in events] == [None] * 29 + ["length"]
    assert {event.id for event in events} == {last.id}
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (12, 30)
    several = {0: "", 1: "", 2: ""}
    for event in complete(client, "In", 10, n=3, stream=True):
        assert event.usage is None
        several[event.choices[0].index] += event.choices[0].text
    assert several == {i: expected(model, "In", 10, seed=i) for i in range(3)}


def test_chats(client: Any, model: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Who\n\nis "}, {"type": "text", "text": "he?"}],
        },
        {"role": "assistant", "content": "David."},
        {"role": "user", "content": " And she?\r\n"},
    ]
    prompt = "System: Be brief.\n\nUser: Who\nis he?\n\nAssistant: David.\n\n"
    prompt += "User: And she?\n\nAssistant:"
    text = expected(model, prompt, 20, stop="\n\nUser:")
    found = ask(client, messages)
    assert found.object == "chat.completion"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].message.content == text.lstrip()
    assert found.usage.prompt_tokens == len(prompt)
    assert text[0].isspace()  # otherwise this would show nothing
    first, *events = ask(client, messages, stream=True)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content for event in events) == text.lstrip()
    newer = ask(client, messages, max_tokens=None, max_completion_tokens=20)
    assert newer.choices[0].message.content == text.lstrip()


def test_a_chat_goes_on_from_the_state_after_its_last_answer(client: Any) -> None:
    messages = [{"role": "user", "content": "Who made the heaven?"}]
    first = ask(client, messages, max_tokens=25, temperature=0)
    messages.append({"role": "assistant", "content": first.choices[0].message.content})
    messages.append({"role": "user", "content": "And the earth?"})
    second = ask(client, messages, temperature=0)
    known = first.usage.total_tokens - 1  # its last token has been written, and not read
    assert second.usage.prompt_tokens_details.cached_tokens == known


def test_texts_end_before_a_stop_across_tokens(client: Any, model: Any) -> None:
    text = expected(model, "And God said", 60)
    stop = text[30:36]  # six tokens
    before = text[: text.index(stop)]
    found = complete(client, "And God said", 60, stop=stop)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (before, "stop")
    assert found.usage.completion_tokens == len(before) + 6
    events = list(complete(client, "And God said", 60, stop=["no such", stop], stream=True))
    assert "".join(event.choices[0].text for event in events) == before
    assert events[-1].choices[0].finish_reason == "stop"
    almost = stop[:-1] + "\N{SNOWMAN}"  # held back, and then it is none
    assert complete(client, "And God said", 60, stop=almost).choices[0].text == text
    asked = [{"role": "user", "content": "Who?"}]
    answer = ask(client, asked, max_tokens=60).choices[0].message.content
    stopped = ask(client, asked, max_tokens=60, stop=answer[20:24]).choices[0]
    assert stopped.message.content == answer[: answer.index(answer[20:24])]


def test_log_probabilities(client: Any, model: Any) -> None:
    prompt = "And God said"
    (choice,) = complete(client, prompt, 8, logprobs=3).choices
    tokens = list((prompt + choice.text).encode())
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]))[0][0, len(prompt) - 1 :]
    table = logits.log_softmax(1)
    found = choice.logprobs
    assert found.tokens == list(choice.text)
    assert found.text_offset == list(range(8))
    for i, row in enumerate(table):
        assert found.token_logprobs[i] == pytest.approx(
            row[tokens[len(prompt) + i]].item(), abs=1e-3
        )
        likeliest = {chr(t): p for p, t in zip(*(x.tolist() for x in row.topk(3)), strict=True)}
        assert found.top_logprobs[i] == pytest.approx(likeliest, abs=1e-3)
    events = list(complete(client, prompt, 8, logprobs=0, stream=True))
    assert [t for event in events for t in event.choices[0].logprobs.tokens] == found.tokens
    assert [o for event in events for o in event.choices[0].logprobs.text_offset] == list(range(8))
    asked = [{"role": "user", "content": "Who?"}]
    (choice,) = ask(client, asked, logprobs=True, top_logprobs=2, max_tokens=8).choices
    assert len(choice.logprobs.content) == 8
    for token in choice.logprobs.content:
        assert bytes(token.bytes).decode() == token.token
        assert [len(token.top_logprobs), token.top_logprobs[0].logprob >= token.logprob] == [
            2,
            True,
        ]
    assert ask(client, asked).choices[0].logprobs is None


def test_32_requests_at_once_write_what_each_writes_alone(client: Any, model: Any) -> None:
    def one(i: int) -> str:
        prompt = f"{'And he said ' * (i % 5)}{i}: In the"
        if i % 2:
            return complete(client, prompt, 8 + i % 8, seed=i).choices[0].text
        events = complete(client, prompt, 8 + i % 8, seed=i, stream=True)
        return "".join(event.choices[0].text for event in events)

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(one, range(32)))
    for i, text in enumerate(found):
        prompt = f"{'And he said ' * (i % 5)}{i}: In the"
        assert text == expected(model, prompt, 8 + i % 8, seed=i), i


# ---- clients that leave, and those that come too late


def endless(url: str, half: bool = False, **options: Any) -> socket.socket:
    """A connection over which a text of a thousand million tokens is asked for, or half asked."""
    asked = {"model": "kjv", "prompt": "In", "max_tokens": 10**9} | options
    body = json.dumps(asked).encode()
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port), timeout=LIMIT)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[: len(body) // 2 if half else None])
    return connection


def wait_for(connection: socket.socket, text: bytes) -> None:
    """Reads from the connection until the text has come."""
    found = b""
    while text not in found:
        part = connection.recv(1000)
        assert part, found
        found += part


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_makes_room(stream: bool, url: str, client: Any) -> None:
    wait_for_room(url)
    with contextlib.ExitStack() as connections:
        for _ in range(8):  # half of them wait
            connection = connections.enter_context(endless(url, stream=stream, n=2))
            if stream:
                wait_for(connection, b"\r\n\r\n")
        while health(url)["texts"] < 16:
            time.sleep(0.02)
    wait_for_room(url)
    assert complete(client, "In", 3).choices[0].finish_reason == "length"


def test_a_full_queue(url: str, client: Any) -> None:
    wait_for_room(url)
    most = ROWS + WAITING
    with endless(url, stream=True, n=most - 1) as connection:
        wait_for(connection, b"200 OK")
        with pytest.raises(openai.RateLimitError, match=f"{most - 1} of {most} texts") as error:
            complete(client, "In", 1, n=2)
        with endless(url):  # waits in the last place
            while health(url)["texts"] < most:
                time.sleep(0.02)
            with pytest.raises(openai.RateLimitError, match=f"{most} of {most} texts"):
                complete(client, "In", 1, stream=True)
    assert error.value.code == "rate_limit_exceeded"
    assert error.value.response.headers["retry-after"] == "1"
    wait_for_room(url)
    assert complete(client, "In", 3).choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match=f"expected 1 to {most} texts"):
        complete(client, "In", 3, n=most + 1)


def test_a_model_that_gives_nan_fails_its_request_alone(url: str, client: Any, model: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(complete, client, "And God said", 100)
        for prompt in ([BROKEN], [65, 66, BROKEN, 67]):
            with pytest.raises(openai.InternalServerError, match=r"the model failed: .*NaN"):
                complete(client, prompt)
            with pytest.raises(openai.APIError, match=r"the model failed: .*NaN"):
                list(complete(client, prompt, stream=True))
        assert other.result().choices[0].text == expected(model, "And God said", 100)
    wait_for_room(url)


# ---- requests that cannot be met


def test_requests_that_are_refused(client: Any) -> None:
    for options, param, message in (
        ({"prompt": "x" * 2001}, "prompt", "expected a prompt of 1 to 2000 tokens, got 2001"),
        ({"prompt": ""}, "prompt", "expected a prompt of 1 to 2000 tokens, got 0"),
        ({"prompt": []}, "n", "expected 1 to 32 texts"),
        ({"prompt": [300]}, "prompt", "prompt: expected tokens from 0 to 255, got 300"),
        ({"prompt": [[65], "a"]}, "prompt", "prompt"),
        ({"tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"tokens": 10**9 + 1}, "max_tokens", "expected at most 1000000000 tokens"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "logit_bias: expected tokens from 0 to 255"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "logit_bias: expected"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "valid integer"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"echo": True}, "echo", "Extra inputs are not permitted"),
        ({"extra_body": {"best_off": 3}}, "best_off", "Extra inputs are not permitted"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            complete(client, **{"prompt": "x"} | options)
        assert message in error.value.message, options
        assert error.value.param == param, options
        assert error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, "x" * 2001, stream=True)
    assert error.value.code == "context_length_exceeded"
    for messages, message in (
        ([], "at least 1 item"),
        ([{"role": "tool", "content": "x"}], "'system', 'developer', 'user' or 'assistant'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ([{"role": "user"}], "Field required"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, messages)
    with pytest.raises(openai.BadRequestError, match="tools: Extra inputs"):
        ask(client, [{"role": "user", "content": "x"}], tools=[])


def test_what_is_no_request(url: str) -> None:
    key, kind = {"Authorization": f"Bearer {KEY}"}, {"Content_Type": "application/json"}
    path = "/v1/completions"
    for status, arguments, headers, message in (
        (400, ("POST", path, b"{"), key | kind, "expected JSON: "),
        (400, ("POST", path, b'{"prompt": "\xff"}'), key | kind, "expected JSON: "),
        (400, ("POST", path, b'"text"'), key | kind, "object"),
        (400, ("POST", path, b'{"model": "kjv", "prompt": "\\ud800"}'), key | kind, ""),
        (413, ("POST", path, b" " * (serve.MOST_BYTES + 1)), key | kind, "expected at most"),
        (415, ("POST", path, b"{}"), key, "expected Content-Type: application/json"),
        (405, ("GET", path), key, "GET /v1/completions: Method Not Allowed"),
        (404, ("GET", "/v1/none"), key, "/v1/none: Not Found"),
        (404, ("GET", "/none"), {}, "/none: Not Found"),
        (401, ("GET", "/v1/models"), {}, "expected the API key"),
        (
            401,
            ("POST", path, b"{"),
            kind | {"Authorization": "Bearer \xe9"},
            "expected the API key",
        ),
    ):
        found, answered, body = fetch(url, *arguments, **headers)
        assert found == status, arguments
        assert answered["content-type"] == "application/json"
        error = json.loads(body)["error"]
        assert message in error["message"]
        assert error.keys() == {"message", "type", "param", "code"}
    # as a page of another site has it that made its name lead to this machine
    assert fetch(url, "GET", "/health", Host="evil.example")[0] == 400


def test_the_key_of_openais_client(url: str) -> None:
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as error:
        complete(wrong, "x")
    assert error.value.code == "invalid_api_key"


# ---- its life


def test_sigterm_finishes_what_runs(checkpoint: str, model: Any) -> None:
    with running(checkpoint) as (process, url):
        with endless(url, half=True):
            pass  # a client that leaves while it asks is nothing for the log
        events = complete(client_of(url), "And God said", 200, stream=True)
        text = next(events).choices[0].text
        process.send_signal(signal.SIGTERM)
        text += "".join(event.choices[0].text for event in events)
        assert text == expected(model, "And God said", 200)
        assert process.wait(timeout=LIMIT) == -signal.SIGTERM
        with pytest.raises(OSError, match="refused"):
            fetch(url, "GET", "/health")
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_mistakes_are_one_line(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["none.pth", "--port", "0"], "no such file: none.pth"),
            ([checkpoint, "--port", port], "in use"),
            ([checkpoint, "--port", "70000"], "--port: expected an integer of at most 65535"),
            ([checkpoint, "--port", "0", "--host", "192.0.2.1"], "assign"),
            ([checkpoint, "--port", "0", "--rows", "0"], "--rows: expected"),
            ([checkpoint, "--port", "0", "--tokenizer", "world"], "--tokenizer: expected"),
        ):
            out = assert_refused(serve.main, "serve.py", arguments, message, capsys)
            assert out == ""


def test_faults_end_what_runs_and_nothing_else(
    model: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the engine, or of a model that needs more memory than there is."""
    engines, faults = [], ["a fault", "out of memory"]
    works = model.forward_

    def forward_(*args: Any) -> Any:
        if faults:
            raise RuntimeError(faults[0])
        return works(*args)

    def step() -> None:
        raise RuntimeError(faults[0])

    def new_engine() -> Any:
        engines.append(serve.Engine(model, max_rows=2))
        return engines[-1]

    def job() -> Any:
        decoder = serve.TextDecoder(TOKENIZER)
        options = {"max_tokens": 5, "seed": 0}
        return serve.Job(0, list(b"In"), options, decoder, False, asyncio.Queue())

    async def run() -> None:
        worker = serve.Worker(new_engine, 2)
        engines[0].step = step
        worker.start()
        try:
            while faults:
                failing = job()
                await worker.submit([failing])
                piece = await asyncio.wait_for(failing.pieces.get(), LIMIT)
                assert str(piece.error) == faults.pop(0)
                worker.release([failing])
            good = job()
            await worker.submit([good])
            pieces = [await asyncio.wait_for(good.pieces.get(), LIMIT) for _ in range(5)]
            assert pieces[-1].end == "length"
            worker.release([good])
            assert worker.open == 0
        finally:
            worker.stop()
        with pytest.raises(serve.ApiError, match="the engine has ended"):
            await worker.submit([job()])
        assert worker.open == 0

    monkeypatch.setattr(model, "forward_", forward_)
    asyncio.run(run())
    assert len(engines) == 2
    log = capfd.readouterr().err
    assert "RuntimeError: a fault" in log
    assert "RuntimeError: out of memory" in log


# ---- the page


class Browser:
    """Chromium without a window, spoken to through a pair of pipes (--remote-debugging-pipe)."""

    def __init__(self, program: str, folder: Path) -> None:
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        command = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "timeout", str(LIMIT), program, *options],
            pass_fds=(read, write),
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._rest, self._count, self._session = b"", 0, {}

    def open(self, url: str) -> None:
        """Opens a page and waits until its script has run."""
        self._session = {}
        target = self.call("Target.createTarget", url=url)["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        ready = 'typeof $ === "function" && $("model").textContent !== ""'
        end = time.monotonic() + LIMIT
        while not self.call("Runtime.evaluate", expression=ready).get("result", {}).get("value"):
            assert time.monotonic() < end
            time.sleep(0.02)

    def call(self, method: str, **params: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._in, 2**16)
                assert part, "the browser has gone"
                self._rest += part
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._count:
                return answer.get("result", answer)  # the page may not be there yet

    def run(self, script: str) -> Any:
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "error" not in found, found
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait(timeout=LIMIT)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program = next(filter(None, found), None)
    if program is None:
        pytest.skip("there is no Chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


# Sends what is typed, and waits until the answer is complete
READ = """new Promise((resolve) => {
  $("send").click();
  setInterval(() => running || resolve($("text").textContent), 20);
})"""


def test_one_types_on_the_page_and_reads(url: str, model: Any, browser: Browser) -> None:
    browser.open(url)
    assert browser.run("$('model').textContent") == "kjv"
    browser.run(f"$('key').value = '{KEY}'; $('temperature').value = 0; $('top-p').value = 1;")
    browser.run("$('length').value = 40; $('chat').checked = false; $('prompt').focus();")
    browser.call("Input.insertText", text="And God <b>said</b>")
    text = browser.run(READ)
    written = expected(model, "And God <b>said</b>", 40, temperature=0.0)
    assert text.strip() == ("And God <b>said</b>" + written).strip()
    browser.run("$('clear').click(); $('chat').checked = true; $('prompt').focus();")
    turns = []
    for question in ("Who is he?", "And she?"):
        browser.call("Input.insertText", text=question)
        before = browser.run("$('text').textContent")
        text = browser.run(READ)
        turns.append({"role": "user", "content": question})
        answer = expected(model, TEMPLATES["chat"].prompt(turns), 40, temperature=0.0).lstrip()
        assert text[len(before) :].strip() == f"{question}\n{answer}".strip()
        turns.append({"role": "assistant", "content": answer})
    browser.run("$('key').value = 'wrong'; $('prompt').value = 'x'")
    assert browser.run(READ).rstrip().endswith("Authorization: Bearer KEY")


def test_the_page_shows_text_while_it_is_written(url: str, browser: Browser) -> None:
    browser.open(url)
    browser.run(f"$('key').value = '{KEY}'; $('length').value = 1e9; $('chat').checked = false;")
    browser.run("$('prompt').value = 'And God said'; $('send').click()")
    for least in (20, 100, 200):
        grown = (
            "new Promise((r) => setInterval(() => $('text').textContent.length > %d && r(), 20))"
        )
        browser.run(grown % least)
    assert browser.run("running !== null")
    browser.run("new Promise((r) => { $('stop').click(); setInterval(() => running || r(), 20); })")
    wait_for_room(url)


def test_logprobs_that_json_does_not_have() -> None:
    assert openai_forms.finite(-float("inf")) == -9999.0
    assert openai_forms.finite(-1.5) == -1.5
