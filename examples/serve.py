"""An OpenAI-compatible server: completions and chats of one model, for many clients at once.

    pip install torch_rwkv6[serve]
    python examples/serve.py RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth --name finch

Then http://127.0.0.1:8000 is a page to write on, and OpenAI's client finds what it knows:

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    messages = [{"role": "user", "content": "What is a finch?"}]
    client.chat.completions.create(model="finch", messages=messages)

Two threads share the work. The event loop of uvicorn speaks with the clients, and never computes. A
`Worker` owns the `Engine`, which takes all texts one token further in each step, and never waits
for a client. `Job`s go from the first to the second, `Piece`s of text come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cli
import uvicorn
from corpus import tokenizer_of
from openai_forms import (
    Answer,
    ApiError,
    Asked,
    Chat,
    ChatAsked,
    Completion,
    CompletionAsked,
    Piece,
    event,
    parsed,
)
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from torch_rwkv6 import models
from torch_rwkv6.__main__ import DTYPES
from torch_rwkv6.models import Engine, Penalties, Sampling, Step, TextDecoder
from torch_rwkv6.models.chat import TEMPLATES, ChatTemplate
from torch_rwkv6.models.tokenizers import Tokenizer

MOST_BYTES = 2 * 2**20  # of a request
MISTAKES = (TypeError, ValueError, LookupError)  # in arguments
# A page may run nothing but the script in it, and speak with this server alone
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'"
)


# ---- the thread that computes


@dataclass(eq=False)
class Job:
    """A text to be written. Made by the event loop, then used by the worker alone."""

    index: int  # among the texts of its request
    prompt: list[int]
    options: dict[str, Any]  # of Engine.submit
    decoder: TextDecoder
    trim: bool  # whether white space before the text is left out
    pieces: asyncio.Queue[Piece]  # of all texts of the request
    request: models.Request | None = None  # to the engine


class Worker(threading.Thread):
    """Runs the engine. `submit` and `release` are for the event loop.

    Args:
        new_engine: makes the engine, and another one after a fault of it.
        most: how many texts may be written or wait.
    """

    def __init__(self, new_engine: Callable[[], Engine], most: int) -> None:
        super().__init__(daemon=True)
        self.open, self.most = 0, most
        self._new_engine, self._engine = new_engine, new_engine()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[models.Request, Job] = {}  # that have not ended
        self._loop: asyncio.AbstractEventLoop | None = None

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Adds the texts of a request. `release` must follow.

        Raises:
            ApiError: there are too many already, the engine refuses one, or it has ended; nothing
                is added.
        """
        if not self.is_alive():
            raise ApiError(503, "the engine has ended: the log tells why", "server_error")
        if self.open + len(jobs) > self.most:
            full = f"{self.open} of {self.most} texts are being written or wait: try again later"
            raise ApiError(429, full, "rate_limit_error", code="rate_limit_exceeded")
        self.open += len(jobs)
        self._loop = asyncio.get_running_loop()
        done = self._loop.create_future()
        self._calls.put(lambda: self._submit(jobs, done))
        try:
            await done
        except BaseException as error:
            self.release(jobs)
            if isinstance(error, MISTAKES):
                raise refused(error) from error
            raise

    def release(self, jobs: Sequence[Job]) -> None:
        """Makes room for others. Texts that have not ended are written no further."""
        self.open -= len(jobs)
        self._calls.put(lambda: self._cancel(jobs))

    def stop(self) -> None:
        self._calls.put(None)
        self.join()

    def run(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                while True:  # waits for a call if there is nothing else to do
                    call = self._calls.get(block=not self._engine.busy)
                    if call is None:
                        return
                    call()
            try:
                for step in self._engine.step():
                    self._pass_on(step)
            except Exception as error:  # the engine's own; those of the model end requests
                traceback.print_exc()
                jobs, self._jobs = list(self._jobs.values()), {}
                for job in jobs:
                    self._send(job, Piece(job.index, error=error))
                self._engine = self._new_engine()

    def _submit(self, jobs: Sequence[Job], done: asyncio.Future[None]) -> None:
        mistake = None
        try:
            for job in jobs:
                job.request = self._engine.submit(job.prompt, **job.options)
                self._jobs[job.request] = job
        except Exception as error:
            mistake = error
        self._in_loop(_settle, done, mistake)

    def _cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.request is not None and self._jobs.pop(job.request, None):
                self._engine.cancel(job.request)

    def _pass_on(self, step: Step) -> None:
        request = step.request
        job = self._jobs[request]
        text = "" if step.token is None else job.decoder.push(step.token)
        if job.decoder.stopped:
            self._engine.cancel(request)
        elif step.finish_reason is not None:
            text += job.decoder.flush()
        end = "stop" if job.decoder.stopped else step.finish_reason
        if end is not None:
            del self._jobs[request]
        if end == "error" and not isinstance(request.error, FloatingPointError):
            traceback.print_exception(request.error)  # of the model
        if job.trim:
            text = text.lstrip()
            job.trim = not text
        piece = Piece(job.index, text, step.token, step.logprob, step.top_logprobs)
        piece.end, piece.error = end, request.error
        self._send(job, piece)

    def _send(self, job: Job, piece: Piece) -> None:
        self._in_loop(job.pieces.put_nowait, piece)

    def _in_loop(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *args)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():  # cancelled, as the client has gone
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


# ---- what comes from HTTP and goes there


class Server:
    """The routes.

    Args:
        worker: writes the texts.
        tokenizer: of the model.
        template: of chats.
        name: of the model, as clients call it.
        max_prompt, max_tokens: the most tokens of a prompt and of an answer.
    """

    def __init__(
        self,
        worker: Worker,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        name: str,
        max_prompt: int,
        max_tokens: int,
    ) -> None:
        self.worker, self.tokenizer, self.template = worker, tokenizer, template
        self.name, self.max_prompt, self.max_tokens = name, max_prompt, max_tokens
        self.page = Path(__file__).with_name("serve.html").read_text("utf-8")
        self.started = int(time.time())

    async def index(self, request: Request) -> Response:
        return HTMLResponse(self.page, headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, request: Request) -> Response:
        alive = self.worker.is_alive()
        content = {"status": "ok" if alive else "the engine has ended", "model": self.name}
        content |= {"texts": self.worker.open, "most": self.worker.most}
        return JSONResponse(content, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        asked = parsed(await body_of(request), CompletionAsked)
        asked.max_tokens = asked.max_tokens or 16  # OpenAI's default
        return await self._answer(request, asked, asked.prompts, Completion)

    async def chat(self, request: Request) -> Response:
        asked = parsed(await body_of(request), ChatAsked)
        asked.max_tokens = asked.max_completion_tokens or asked.max_tokens
        prompt = self.template.prompt([message.turn for message in asked.messages])
        return await self._answer(request, asked, [prompt], Chat)

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "user"}

    def _check_name(self, name: str) -> None:
        if name != self.name:
            message = f"there is no model {name!r} here, but {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _answer(
        self,
        request: Request,
        asked: Asked,
        prompts: Sequence[str | list[int]],
        form: type[Answer],
    ) -> Response:
        self._check_name(asked.model)
        # in a thread: the tokenizer takes a while for a long text, and the event loop has others
        tokens = await asyncio.to_thread(lambda: [self._tokens(prompt) for prompt in prompts])
        jobs = self._jobs(asked, tokens, trim=form is Chat)
        answer = form(self.name, self.tokenizer, asked, sum(map(len, tokens)))
        await self.worker.submit(jobs)
        release = partial(self.worker.release, jobs)
        if asked.stream:
            return EventStream(events(answer, jobs), release)
        try:
            return await unless_gone(request, whole(answer, jobs))
        finally:
            release()

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        try:
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        except UnicodeEncodeError as error:
            raise ApiError(400, f"expected text that the tokenizer has: {error}") from error
        if not 0 < len(tokens) <= self.max_prompt:
            message = f"expected a prompt of 1 to {self.max_prompt} tokens, got {len(tokens)}"
            code = "context_length_exceeded" if tokens else None
            raise ApiError(400, message, param="prompt", code=code)
        return tokens

    def _jobs(self, asked: Asked, prompts: Sequence[list[int]], trim: bool) -> list[Job]:
        count = len(prompts) * asked.n
        if not 0 < count <= self.worker.most:
            message = f"expected 1 to {self.worker.most} texts in a request, got {count}"
            raise ApiError(400, message, param="n")
        if (asked.max_tokens or 1) > self.max_tokens:
            message = f"expected at most {self.max_tokens} tokens, got {asked.max_tokens}"
            raise ApiError(400, message, param="max_tokens")
        seed = int.from_bytes(os.urandom(4), "big") if asked.seed is None else asked.seed
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        try:
            options = {
                "max_tokens": asked.max_tokens or self.max_tokens,
                "sampling": Sampling(
                    temperature=asked.temperature,
                    top_k=asked.top_k,
                    top_p=asked.top_p,
                    min_p=asked.min_p,
                    logit_bias=asked.logit_bias,
                ),
                # OpenAI counts all of the text alike
                "penalties": Penalties(asked.presence_penalty, asked.frequency_penalty, 1.0),
                "stop_tokens": self.tokenizer.end_tokens,
                "logprobs": asked.wanted_logprobs,
            }
            return [
                Job(
                    index=i,
                    prompt=prompts[i // asked.n],
                    options=options | {"seed": seed + i % asked.n},
                    decoder=TextDecoder(self.tokenizer, asked.stops),
                    trim=trim,
                    pieces=pieces,
                )
                for i in range(count)
            ]
        except MISTAKES as error:
            raise refused(error) from error


def refused(error: Exception) -> ApiError:
    """For a mistake of the client's that the package found, whose messages begin with a name."""
    return ApiError(400, str(error), param=str(error).partition(":")[0])


async def body_of(request: Request) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too large, or not declared as JSON: a browser sends that to another site
            than a page's own only if that site agrees, which this one does not.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "expected Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"expected at most {MOST_BYTES} bytes")
    return bytes(body)


async def pieces_of(answer: Answer, jobs: Sequence[Job]) -> AsyncIterator[Piece]:
    """The pieces of all texts of a request, as they come.

    Raises:
        ApiError: writing one of them failed.
    """
    unfinished = len(jobs)
    while unfinished:
        piece = await jobs[0].pieces.get()
        if piece.error is not None:
            raise ApiError(500, f"the model failed: {piece.error}", "server_error")
        answer.tokens += piece.token is not None
        unfinished -= piece.end is not None
        if not unfinished:
            first = [job.request for job in jobs[:: answer.asked.n]]  # of each prompt
            answer.cached_tokens = sum(request.cached_tokens for request in first if request)
        yield piece


async def whole(answer: Answer, jobs: Sequence[Job]) -> Response:
    texts: list[list[Piece]] = [[] for _ in jobs]
    async for piece in pieces_of(answer, jobs):
        texts[piece.index].append(piece)
    return JSONResponse(answer.whole(texts))


async def events(answer: Answer, jobs: Sequence[Job]) -> AsyncIterator[str]:
    for part in answer.opening():
        yield part
    try:
        async for piece in pieces_of(answer, jobs):
            for part in answer.part(piece):
                yield part
    except ApiError as error:  # too late for a status
        yield event(error.content)
        return
    for part in answer.closing():
        yield part


class EventStream(StreamingResponse):
    """Events for the client; release is called at the end, also where the client leaves early."""

    def __init__(self, events: AsyncIterator[str], release: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of the work, which is given up when the client leaves."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(leaves())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()


class ApiKey:
    """Lets requests pass that have the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("authorization", "").encode()
        app = self.app
        if not hmac.compare_digest(given, self.key):  # takes as long for every wrong key
            message = "expected the API key of this server as Authorization: Bearer KEY"
            app = refusal(ApiError(401, message, code="invalid_api_key"))
        await app(scope, receive, send)


def refusal(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.content, error.status, headers)


async def on_api_error(request: Request, error: Any) -> Response:
    return refusal(error)


async def on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's word for it; nobody reads it


async def on_http_error(request: Request, error: Any) -> Response:
    return refusal(
        ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    )


async def on_fault(request: Request, error: Exception) -> Response:
    return refusal(ApiError(500, "a fault of the server: its log tells more", "server_error"))


def application(server: Server, key: str | None, hosts: Sequence[str]) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.worker.start()
        yield
        server.worker.stop()

    api = [
        Route("/models", server.models),
        Route("/models/{name:path}", server.model),
        Route("/completions", server.completions, methods=["POST"]),
        Route("/chat/completions", server.chat, methods=["POST"]),
    ]
    return Starlette(
        routes=[
            Route("/", server.index),
            Route("/health", server.health),
            Mount("/v1", routes=api, middleware=[Middleware(ApiKey, key=key)] if key else None),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            ApiError: on_api_error,
            ClientDisconnect: on_client_gone,
            HTTPException: on_http_error,
            Exception: on_fault,
        },
        lifespan=lifespan,
    )


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@cli.command
def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("model", help=".pth or .safetensors, or a Hugging Face folder")
    parser.add_argument("--name", help="of the model, for clients; by default that of its file")
    parser.add_argument("--tokenizer", help=cli.TOKENIZER)
    parser.add_argument("--template", choices=TEMPLATES, default="chat", help="of chats")
    parser.add_argument("--state", help="file of tuned states that texts start from")
    parser.add_argument("--lora", help="folder of a LoRA to merge, as peft saves it")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--dtype", choices=DTYPES, help="of the parameters; as in the file")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is for other machines, too")
    parser.add_argument("--port", type=cli.integer(0, 65535), default=8000, help="0 is a free one")
    parser.add_argument(
        "--api-key",
        help="that clients must have; safer in the environment, as RWKV_API_KEY",
    )
    parser.add_argument("--rows", type=cli.positive, default=32, help="texts written at once")
    parser.add_argument("--queue", type=cli.integer(0), default=64, help="texts that may wait")
    parser.add_argument("--max-prompt", type=cli.positive, default=32768, help="its most tokens")
    parser.add_argument("--max-tokens", type=cli.positive, default=4096, help="of an answer")
    parser.add_argument(
        "--cache", type=cli.integer(0), default=256, help="MiB for states of prompts read before"
    )
    args = parser.parse_args(argv)
    # Bound before the model is loaded, which takes long; nobody is listened to until it is
    listener = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((args.host, args.port))
    dtype = DTYPES[args.dtype] if args.dtype else None
    model = models.load(args.model, args.device, dtype, state=args.state, lora=args.lora).eval()
    tokenizer = tokenizer_of(model.vocab_size, args.tokenizer)
    new_engine = partial(Engine, model, max_rows=args.rows, cache_bytes=args.cache * 2**20)
    server = Server(
        Worker(new_engine, args.rows + args.queue),
        tokenizer,
        TEMPLATES[args.template],
        args.name or Path(args.model).resolve().stem,
        args.max_prompt,
        args.max_tokens,
    )
    # A page of another site could otherwise have its name lead here, and read what it likes
    hosts = ["127.0.0.1", "localhost", "::1", "[::1]"] if is_loopback(args.host) else ["*"]
    key = args.api_key or os.environ.get("RWKV_API_KEY")
    config = uvicorn.Config(application(server, key, hosts), log_level="warning")
    host = f"[{args.host}]" if ":" in args.host else args.host
    listener.listen(config.backlog)
    print(f"{server.name}: http://{host}:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
