"""An engine's answer as it comes: an event stream -> events -> a reply that grows. Standard library only."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .incoming import read_json

# A line of a stream that is longer than this is no piece of an answer.
LONGEST_LINE = 1 << 20
# Nor does an engine count to more than this.
_MOST = 1 << 48
# Where engines put what a model thinks: SGLang and transformers, vLLM.
_THOUGHTS = ("reasoning_content", "reasoning")
# How engines end what they did not finish.
_BROKEN_ENDS = ("abort", "error", "cancelled", "content_filter")
# How engines say that max_tokens was reached, in small letters.
_LENGTH_ENDS = ("length", "max_tokens", "max_length", "max_output_tokens", "model_length", "token_limit")
_CHUNK = "chat.completion.chunk"
DONE = "[DONE]"


@dataclass(slots=True)
class Reply:
    """An answer as far as it has come. Times are those of time.perf_counter()."""

    sent_s: float
    text: str = ""
    thinking: str = ""
    pieces: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    # How the engine says it ended: "stop", or "length" where max_tokens was reached. Empty until then.
    ended: str = ""
    # The engine's own numbers; empty where it sends none.
    usage: Mapping[str, Any] = field(default_factory=dict)
    # What some engines tell themselves by.
    fingerprint: str = ""

    @property
    def broken(self) -> bool:
        """Whether the engine gave it up."""
        return self.ended in _BROKEN_ENDS

    @property
    def cached(self) -> int:
        """Tokens of the prompt that the engine still had."""
        details = self.usage.get("prompt_tokens_details")
        return _whole(details.get("cached_tokens")) if isinstance(details, dict) else 0

    def count(self, name: str) -> int:
        """One of the engine's own numbers; 0 where it tells none."""
        return _whole(self.usage.get(name))

    def take(self, event: Mapping[str, Any]) -> bool:
        """Grow by an event of event_of(), which is no error; returns whether there is more text now."""
        if isinstance(event.get("usage"), dict):
            self.usage = event["usage"]
        if isinstance(event.get("system_fingerprint"), str):
            self.fingerprint = event["system_fingerprint"]
        before = self.pieces
        for choice in (event.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            text, *thoughts = (delta.get(name) or "" for name in ("content", *_THOUGHTS))
            if text or any(thoughts):
                self._add(text, next(filter(None, thoughts), ""))
            ended = choice.get("finish_reason") or self.ended
            self.ended = "length" if ended.lower() in _LENGTH_ENDS else ended
        return self.pieces > before

    def end(self, max_tokens: int) -> None:
        """At its end: an engine that made as many tokens as it may has stopped for that, whatever it says."""
        self.ended = self.ended or "stop"
        if self.ended == "stop" and 0 < max_tokens <= self.count("completion_tokens"):
            self.ended = "length"

    def _add(self, text: str, thinking: str) -> None:
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        self.pieces += 1
        self.text += text
        self.thinking += thinking


def event_of(data: str) -> dict[str, Any] | None:
    """A piece of an answer, or an object with an `error`; None where it is neither. Pure."""
    try:
        event = read_json(data)
    except ValueError:
        return None
    if not isinstance(event, dict):
        return None
    choices = event.get("choices")
    if choices is None and (
        "choices" in event or event.get("object") == _CHUNK or isinstance(event.get("usage"), dict)
    ):
        choices = []  # a closing event that holds the numbers alone
    fits = isinstance(choices, list) and all(_is_choice(each) for each in choices)
    return event if fits or event.get("error") else None


def _is_choice(choice: Any) -> bool:
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta") or {}
    texts = [delta.get(name) for name in ("content", *_THOUGHTS)] if isinstance(delta, dict) else [0]
    return all(isinstance(text, str | None) for text in (*texts, choice.get("finish_reason")))


async def stream_data(blocks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """What stands after each "data:" of an event stream; comments and other fields are passed over.

    Ends early where a line is longer than any piece of an answer.
    """
    # A line that comes in many blocks is put together once.
    begun: list[bytes] = []
    length = 0
    async for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        length += len(first)
        if others:
            *lines, rest = b"".join(begun), *others
            begun, length = [rest], len(rest)
            for line in lines:
                if len(line) > LONGEST_LINE:
                    return
                if line.startswith(b"data:"):
                    yield line[5:].decode(errors="replace").strip()
        if length > LONGEST_LINE:
            return


def _whole(number: object) -> int:
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 < number <= _MOST else 0
