"""OpenAI's forms of requests, answers and errors, for ``serve.py``."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from torch_rwkv6.models.tokenizers import Tokenizer

# ---- requests


class Strict(BaseModel):
    """Refuses what it does not know, such as OpenAI's tools and images.

    An answer that ignored a wish would be taken for what it is not.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        """null is the default, as OpenAI has it: clients write it for what they were not told."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # of the sizes of events: never done here


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Asked(Strict):
    """What completions and chats have in common.

    Names, defaults and limits are OpenAI's. top_k and min_p are not, but other servers have them.
    """

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, float] = {}
    n: int = Field(1, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None  # this and the next two are OpenAI's, for purposes of its own
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionAsked(Asked):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        alone = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if alone else given

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def turn(self) -> dict[str, str]:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatAsked(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # the newer name of max_tokens
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def wanted_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class ApiError(Exception):
    """An error that the client is told.

    Args:
        status: of HTTP.
        message: what is wrong.
        kind: OpenAI's "type" of error.
        param: the argument that is wrong.
        code: OpenAI's word for it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parsed(body: bytes, form: type[Asked]) -> Any:
    """The request in the body.

    Raises:
        ApiError: it is none.
    """
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        found = error.errors()
        if found[0]["type"] == "json_invalid":
            raise ApiError(400, f"expected JSON: {found[0]['msg']}") from error
        param = str(found[0]["loc"][0]) if found[0]["loc"] else None
        places = [".".join(str(part) for part in one["loc"]) for one in found]
        told = [f"{place}: {one['msg']}" for place, one in zip(places, found, strict=True)]
        raise ApiError(400, "; ".join(told[:4]), param=param) from error


# ---- answers


@dataclass
class Piece:
    """What a step added to a text: a token, some text, or its end."""

    index: int  # of the text among those of its request
    text: str = ""  # "" while it may be a stop, or no whole character
    token: int | None = None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()  # the likeliest tokens and their log-probabilities
    end: Literal["stop", "length"] | None = None
    error: Exception | None = None


class Answer:
    """The answer to a request, whole or as events: what both kinds have in common."""

    kind: str  # of its id
    object: str
    event: str  # the "object" of an event

    def __init__(self, model: str, tokenizer: Tokenizer, asked: Asked, prompt_tokens: int) -> None:
        identity = f"{self.kind}-{uuid.uuid4().hex}"
        self.head = {"id": identity, "created": int(time.time()), "model": model}
        self.tokenizer, self.asked = tokenizer, asked
        self.prompt_tokens, self.tokens = prompt_tokens, 0
        self.cached_tokens = 0

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:  # of each text
        choices = [
            {
                "index": i,
                **self.content("".join(piece.text for piece in own)),
                "logprobs": self.logprobs(own),
                "finish_reason": own[-1].end,
            }
            for i, own in enumerate(pieces)
        ]
        return {**self.head, "object": self.object, "choices": choices, "usage": self.usage()}

    def opening(self) -> list[str]:
        """The events before the first piece."""
        return []

    def part(self, piece: Piece) -> list[str]:
        """The event of a piece, if it is worth one."""
        logprobs = self.logprobs([piece])
        if not (piece.text or piece.end or logprobs):
            return []
        choice = {
            "index": piece.index,
            **self.delta(piece.text),
            "logprobs": logprobs,
            "finish_reason": piece.end,
        }
        return [self._event([choice])]

    def closing(self) -> list[str]:
        """The events after the last piece."""
        usage = [self._event([], self.usage())] if self.asked.stream_options.include_usage else []
        return [*usage, "data: [DONE]\n\n"]

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        """Of the tokens among the pieces; None where they were not asked for."""
        if self.asked.wanted_logprobs is None:
            return None
        found = [piece for piece in pieces if piece.token is not None]
        return self.logprobs_of(found) if found else None

    def logprobs_of(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        raise NotImplementedError

    def _event(self, choices: list[dict[str, Any]], usage: Any = None) -> str:
        content = {**self.head, "object": self.event, "choices": choices, "usage": usage}
        return event(content)

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token])


class Completion(Answer):
    kind, object, event = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.offsets: dict[int, int] = {}  # of each text, where its next token begins

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    delta = content

    def logprobs_of(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        tokens = [self._text(piece.token) for piece in pieces]
        offset = self.offsets.get(pieces[0].index, 0)
        offsets = []
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        self.offsets[pieces[0].index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [finite(piece.logprob) for piece in pieces],
            "top_logprobs": [{self._text(t): finite(p) for t, p in piece.top} for piece in pieces],
            "text_offset": offsets,
        }


class Chat(Answer):
    kind, object, event = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def opening(self) -> list[str]:
        role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        indices = range(self.asked.n)
        return [self._event([{"index": i, **role, "finish_reason": None}]) for i in indices]

    def logprobs_of(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        def one(token: int, logprob: float | None) -> dict[str, Any]:
            text = self._text(token)
            whole = "\ufffd" not in text  # otherwise its bytes are no characters alone
            return {
                "token": text,
                "logprob": finite(logprob),
                "bytes": list(text.encode()) if whole else None,
            }

        return {
            "content": [
                {**one(piece.token, piece.logprob), "top_logprobs": [one(*t) for t in piece.top]}
                for piece in pieces
            ],
            "refusal": None,
        }


def event(content: dict[str, Any]) -> str:
    """An event of a stream (server-sent events)."""
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def finite(logprob: float | None) -> float | None:
    """JSON has no -inf; OpenAI writes -9999."""
    return None if logprob is None else max(logprob, -9999.0)
