"""The model's tokens -> text: what it thinks, what it answers, and when it has said enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..request import Answer, Request, Sampling

THINK_START, THINK_END = "<think>", "</think>"
# What Qwen's models were taught to read where their thinking is cut short.
CLOSING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    f"\n{THINK_END}\n\n"
)


class Tokenizer(Protocol):
    """transformers' tokenizer: as much of it as makes text of tokens."""

    def decode(self, token_ids: list[int], **how: bool) -> str:
        """The text of the tokens."""

    def encode(self, text: str, **how: bool) -> list[int]:
        """The tokens of a text."""


class NoAnswerError(RuntimeError):
    """The model used up its tokens before it began to answer."""


def why_no_answer(request: Request) -> NoAnswerError:
    """The error: what happened, and what helps. Pure."""
    return NoAnswerError(
        f"{request.load.model} was still thinking after {request.sampling.longest} tokens, so there is no answer. "
        "Raise max_new_tokens, set a thinking_budget, or pick a model that does not think (Instruct)."
    )


def split_thinking(text: str, thinks: bool) -> tuple[str, str | None]:
    """(thinking, answer) of a model's text; the answer is None where the think block was never closed. Pure.

    Args:
        thinks: whether the prompt has opened the think block already.
    """
    opened = text.lstrip().startswith(THINK_START)
    # A stray </think> of a model that was not thinking ends nothing: all before it would be lost.
    if not (opened or thinks):
        return "", text.strip()
    if opened:
        text = text.lstrip().removeprefix(THINK_START)
    thinking, closed, answer = text.partition(THINK_END)
    return thinking.strip(), answer.strip() if closed else None


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Whether one of the stops is in the text. Pure."""
    return any(stop in text for stop in stops)


def cut_before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops, or all of it. Pure."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def certain(text: str, stops: Sequence[str]) -> str:
    """The text without an end that may be the beginning of a stop. Pure."""
    sizes = (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size]))
    return text[: len(text) - max(sizes, default=0)]


class TextStream:
    """Tokens in, text out as far as it is certain: a character may be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self.tokens = 0
        self.text = ""

    def push(self, ids: Sequence[int]) -> None:
        """Append tokens; `text` grows by what they complete."""
        self.tokens += len(ids)
        self._pending += ids
        piece = self._decode()
        # An unfinished character decodes to U+FFFD; four tokens hold the longest one.
        if not piece.endswith("\ufffd") or len(self._pending) > 4:
            self.text += piece
            self._pending.clear()

    def end(self) -> str:
        """The whole text, an unfinished last character included."""
        self.text += self._decode()
        self._pending.clear()
        return self.text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Writer:
    """One answer while it is made.

    Args:
        thinks: whether the prompt has opened the think block already.

    Attributes:
        ended: whether nothing more comes, of the thought at least.
        over_budget: whether the thinking budget is used up, or the text at its end, before the thought is.
    """

    def __init__(self, tokenizer: Tokenizer, thinks: bool, sampling: Sampling) -> None:
        self._tokenizer = tokenizer
        self._thinks = thinks
        self._sampling = sampling
        self._stream = TextStream(tokenizer)
        # The thought that the budget ended, and the tokens up to there.
        self._cut_thought: str | None = None
        self._before_cut = 0
        self._thought_tokens = 0
        self.ended = self.over_budget = False

    @property
    def tokens(self) -> int:
        """How many there are, the thought's too."""
        return self._before_cut + self._stream.tokens

    @property
    def so_far(self) -> Answer:
        """What is certain of it."""
        thinking, answer = self._split()
        # What a model that opens the block itself begins with may be a part of the mark.
        if not answer or THINK_START.startswith(answer):
            return Answer("", thinking)
        stops = self._sampling.stop
        return Answer(cut_before(answer, stops) if has_stop(answer, stops) else certain(answer, stops), thinking)

    def push(self, ids: Sequence[int]) -> bool:
        """Take the next tokens, none where the model has ended the text; returns whether it is enough."""
        if not self.ended:
            self._stream.push(ids)
            self.ended = not ids or self._is_enough()
            self.over_budget = self.ended and self._sampling.thinking_budget > 0 and self._split()[1] is None
        return self.ended

    def close_thought(self) -> list[int]:
        """End the thought: the answer is to follow. Returns the tokens that tell the model so."""
        self._cut_thought = self._split()[0]
        self._before_cut = self._stream.tokens
        self._stream = TextStream(self._tokenizer)
        self._thought_tokens = 0
        self.ended = self.over_budget = False
        return self._tokenizer.encode(CLOSING, add_special_tokens=False)

    def end(self) -> Answer | None:
        """The whole of it; None where the model was still thinking."""
        self._stream.end()
        thinking, answer = self._split()
        return None if answer is None else Answer(cut_before(answer, self._sampling.stop).strip(), thinking)

    def _split(self) -> tuple[str, str | None]:
        if self._cut_thought is not None:
            return self._cut_thought, self._stream.text.strip()
        return split_thinking(self._stream.text, self._thinks)

    def _is_enough(self) -> bool:
        """Of what the token loop does not know: stops, and the limits of the two parts."""
        stops, budget = self._sampling.stop, self._sampling.thinking_budget
        if not (stops or budget):
            return False
        answer = self._split()[1]
        if not answer:
            # The mark that ends the thought and the empty line after it are no part of the answer.
            self._thought_tokens = self._stream.tokens
            return answer is None and 0 < budget <= self._thought_tokens
        if budget and self._stream.tokens - self._thought_tokens >= self._sampling.max_new_tokens:
            return True
        return has_stop(answer, stops)
