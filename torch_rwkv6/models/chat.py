"""Chats as the World models know them: plain text, in which every turn begins with a name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_rwkv6.files import StrPath
from torch_rwkv6.models.engine import PIECE
from torch_rwkv6.models.generation import generate_text, tokens_of
from torch_rwkv6.models.tokenizers import Tokenizer
from torch_rwkv6.nn import RWKV, RWKVState
from torch_rwkv6.nn.sharded import device_of

__all__ = ["TEMPLATES", "Chat", "ChatTemplate"]


@dataclass(frozen=True)
class ChatTemplate:
    """The names with which turns begin: of instructions, of who asks and of who answers.

    ::

        User: What is a finch?

        Assistant: A bird.

    An empty line ends a turn, so none may be within one.
    """

    system: str
    user: str
    assistant: str

    def turn(self, role: str, content: str) -> str:
        """The text of one turn.

        Args:
            role: "system", "user" or "assistant", as in OpenAI's messages; "developer" is "system".
            content: what was said; its empty lines are left out.

        Raises:
            ValueError: another role.
        """
        names = {
            "system": self.system,
            "developer": self.system,
            "user": self.user,
            "assistant": self.assistant,
        }
        if role not in names:
            raise ValueError(f"role: expected {', '.join(names)}, got {role!r}")
        content = re.sub(r"\s*\n\s*\n", "\n", content.replace("\r\n", "\n").strip())
        return f"{names[role]}: {content}\n\n"

    @property
    def opening(self) -> str:
        """What an answer comes after."""
        return f"{self.assistant}:"

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends an answer, which is how the next question begins."""
        return (f"\n\n{self.user}:",)

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a chat up to where the next answer begins.

        Args:
            messages: the turns until then, each with "role" and "content".

        Raises:
            ValueError: no message, or a role that there is not.
        """
        if not messages:
            raise ValueError("messages: expected at least one, got none")
        turns = [self.turn(message["role"], message["content"]) for message in messages]
        return "".join(turns) + self.opening


# The forms that BlinkDL's pages of the World models recommend
TEMPLATES = {
    "chat": ChatTemplate("System", "User", "Assistant"),
    "qa": ChatTemplate("System", "Question", "Answer"),
}


class Chat:
    """A conversation with a model. All that it keeps is one state after each turn.

    ::

        chat = Chat(model, load_tokenizer("world"))
        answer = ""
        for piece in chat.answer("What is a finch?"):
            print(piece, end="", flush=True)
            answer += piece
        chat.remember("What is a finch?", answer)

    Args:
        model: of any version.
        tokenizer: the model's own.
        template: how turns are written.
        system: instructions at the beginning; none if empty.
    """

    def __init__(
        self,
        model: RWKV,
        tokenizer: Tokenizer,
        template: ChatTemplate = TEMPLATES["chat"],
        system: str = "",
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.states = [model.initial_state(1).detach()]  # from the beginning to now
        if system:
            self.states = [self._after(template.turn("system", system))]

    def answer(self, text: str, max_tokens: int = 500, **options: Any) -> Iterator[str]:
        """Yields the answer, piece by piece. The chat itself stays as it is: see `remember`.

        Args:
            text: the question.
            max_tokens: the length of the answer at most.
            options: of `generate_text`.

        Raises:
            TypeError, ValueError: see `generate_text`.
        """
        return generate_text(
            self.model,
            self.tokenizer,
            self.template.turn("user", text) + self.template.opening,
            max_tokens,
            stop=self.template.stops,
            state=self.states[-1].clone(),
            **options,
        )

    def remember(self, text: str, answer: str) -> None:
        """Adds a question and what was answered to the chat.

        Both are read as text, so the state does not depend on how the answer came to its end.

        Raises:
            ValueError: a character that the tokenizer does not have, or half of one.
        """
        turns = self.template.turn("user", text) + self.template.turn("assistant", answer)
        self.states.append(self._after(turns))

    def undo(self) -> bool:
        """Forgets the last turn; False if there is none."""
        if len(self.states) == 1:
            return False
        self.states.pop()
        return True

    def save(self, path: StrPath) -> None:
        """Saves the chat: see `RWKVState.save`."""
        self.states[-1].save(path)

    def load(self, path: StrPath) -> None:
        """Goes on with a chat that was saved. It counts as a turn, which `undo` takes back.

        Raises:
            OSError: the file cannot be read.
            TypeError, ValueError: it holds no state, or that of another model.
        """
        weight = self.model.ln_out.weight
        state = RWKVState.load(path, device_of(weight)).to(dtype=weight.dtype)
        self.model.check_state(state, 1)
        self.states.append(state)

    @torch.no_grad()
    def _after(self, text: str) -> RWKVState:
        """The state after the text, which comes next."""
        state = self.states[-1].clone()
        ids = tokens_of("text", text, self.tokenizer)
        tokens = torch.tensor([ids], dtype=torch.int64, device=state.wkv.device)
        for piece in tokens.split(PIECE, 1):
            self.model.forward_(piece, state)
        return state
