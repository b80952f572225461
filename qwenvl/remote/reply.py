"""Reads an engine's answer while it comes: a stream of events into a growing reply. Standard library only."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .incoming import read_json

# Bytes: a longer line of a stream is not a piece of an answer.
LONGEST_LINE = 1 << 20
# A larger count of tokens is not one.
_MOST = 1 << 48
# Fields with a model's thoughts: the first of SGLang and transformers, the second of vLLM.
_THOUGHTS = ("reasoning_content", "reasoning")
# Values of finish_reason for an answer that was not finished.
_BROKEN_ENDS = ("abort", "error", "cancelled", "content_filter")
# Values of finish_reason for max_tokens being reached, in small letters.
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
    # The engine's finish_reason: "stop", or "length" if max_tokens was reached. Empty until the end.
    ended: str = ""
    # The engine's own counts of tokens; empty if it sends none.
    usage: Mapping[str, Any] = field(default_factory=dict)
    # By this field some kinds of engine can be recognised.
    fingerprint: str = ""

    @property
    def broken(self) -> bool:
        """Tell if the engine ended the answer before it was finished."""
        return self.ended in _BROKEN_ENDS

    @property
    def cached(self) -> int:
        """Return how many of the prompt's tokens the engine had in its cache."""
        details = self.usage.get("prompt_tokens_details")
        return _whole(details.get("cached_tokens")) if isinstance(details, dict) else 0

    def count(self, name: str) -> int:
        """Return one of the engine's own counts; 0 if it sends none."""
        return _whole(self.usage.get(name))

    def take(self, event: Mapping[str, Any]) -> bool:
        """Add an event of event_of() that is not an error; return True if the text or the thinking has grown."""
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
        """Close the reply. If the engine used all of max_tokens, that was the reason, whatever it names."""
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
    """Read a piece of an answer, or an object with an `error`; None if it is neither. Pure."""
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
        choices = []  # a closing event that holds only the counts
    fits = isinstance(choices, list) and all(_is_choice(choice) for choice in choices)
    return event if fits or event.get("error") else None


def _is_choice(choice: Any) -> bool:
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta") or {}
    texts = [delta.get(name) for name in ("content", *_THOUGHTS)] if isinstance(delta, dict) else [0]
    return all(isinstance(text, str | None) for text in (*texts, choice.get("finish_reason")))


async def stream_data(blocks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Yield what stands after each "data:" of an event stream; comments and other fields are passed over.

    It ends early if a line is longer than LONGEST_LINE.
    """
    # The blocks of a line, which are joined only once.
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
