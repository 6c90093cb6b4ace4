"""From tokens to the text that is shown: whole characters, up to a stop."""

from __future__ import annotations

from collections.abc import Collection

from torch_rwkv6.models.tokenizers import Tokenizer

__all__ = ["TextDecoder"]


class TextDecoder:
    """Turns the tokens of one sequence into text, as soon as it may be shown.

    ::

        decoder = TextDecoder(tokenizer, stop="\\n\\nUser:")
        for token in tokens:
            print(decoder.push(token), end="")
            if decoder.stopped:
                break
        print(decoder.flush())

    A character split over tokens is held back until its last byte is there; bytes that are no
    UTF-8 come as U+FFFD. What may be the beginning of a stop is held back until it is known.

    Args:
        tokenizer: of the tokens: see `load_tokenizer`.
        stop: a text, or several: the text ends before the first of them to be complete.

    Attributes:
        stopped: whether a stop has been found; there is no more text then.

    Raises:
        TypeError: no tokenizer, or a stop that is no text.
        ValueError: an empty stop.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Collection[str] = ()) -> None:
        if not hasattr(tokenizer, "stream"):
            raise TypeError(
                f"tokenizer: expected one of load_tokenizer, got {type(tokenizer).__name__}"
            )
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, Collection) or not all(isinstance(text, str) for text in stops):
            raise TypeError(f"stop: expected a text or several, got {stop!r}")
        if not all(stops):
            raise ValueError("stop: expected some text, got an empty one")
        self.stopped = False
        self._stops = list(stops)
        self._stream = tokenizer.stream()
        self._held = ""  # what may be the beginning of a stop

    def push(self, token: int) -> str:
        """The text that may be shown now: "" while it may be a stop, or no whole character."""
        return "" if self.stopped else self._cut(self._stream.push(token))

    def flush(self) -> str:
        """What was held back, when there are no more tokens."""
        if self.stopped:
            return ""
        text = self._cut(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _cut(self, text: str) -> str:
        text = self._held + text
        ends = [(text.index(s) + len(s), text.index(s)) for s in self._stops if s in text]
        if ends:
            self._held, self.stopped = "", True
            return text[: min(ends)[1]]
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]
