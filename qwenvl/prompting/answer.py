"""The answer as text, from the model's tokens: its thinking, the answer itself, and when it is to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..request import Answer, Request, Sampling

THINK_START, THINK_END = "<think>", "</think>"
# The text with which Qwen's models were trained to end a thought that is cut short.
CLOSING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    f"\n{THINK_END}\n\n"
)


class Tokenizer(Protocol):
    """The methods of transformers' tokenizer that are needed here."""

    def decode(self, token_ids: list[int], **how: bool) -> str:
        """Return the text of the tokens."""

    def encode(self, text: str, **how: bool) -> list[int]:
        """Return the ids of a text's tokens."""


class NoAnswerError(RuntimeError):
    """The model used all of its tokens before it began to answer."""


def why_no_answer(request: Request) -> NoAnswerError:
    """Return an error that says what happened, and what helps."""
    return NoAnswerError(
        f"{request.load.model} was still thinking after {request.sampling.longest} tokens, so there is no answer. "
        "Raise max_new_tokens, set a thinking_budget, or pick a model that does not think (Instruct)."
    )


def split_thinking(text: str, thinks: bool) -> tuple[str, str | None]:
    """Split a model's text into (thinking, answer); the answer is None if the think block is not closed.

    Args:
        thinks: True if the prompt has opened the think block already.
    """
    opened = text.lstrip().startswith(THINK_START)
    # Without an opened block a </think> is kept as text: otherwise the answer before it would be lost.
    if not (opened or thinks):
        return "", text.strip()
    if opened:
        text = text.lstrip().removeprefix(THINK_START)
    thinking, closed, answer = text.partition(THINK_END)
    return thinking.strip(), answer.strip() if closed else None


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Return True if the text holds one of the stops."""
    return any(stop in text for stop in stops)


def cut_before(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first of the stops, or all of it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def certain(text: str, stops: Sequence[str]) -> str:
    """Return the text without an end that may be the beginning of a stop."""
    sizes = (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size]))
    return text[: len(text) - max(sizes, default=0)]


class TextStream:
    """The text of tokens that come one after the other; a character that lacks tokens waits for them.

    Attributes:
        tokens: number of tokens so far.
        text: text of the tokens so far, up to the last whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self.tokens = 0
        self.text = ""

    def push(self, ids: Sequence[int]) -> None:
        """Append tokens; `text` grows by the characters that they complete."""
        self.tokens += len(ids)
        self._pending += ids
        piece = self._decode()
        # An unfinished character decodes to U+FFFD, and no character has more than four tokens.
        if not piece.endswith("\ufffd") or len(self._pending) > 4:
            self.text += piece
            self._pending.clear()

    def end(self) -> str:
        """Return the whole text, an unfinished last character included."""
        self.text += self._decode()
        self._pending.clear()
        return self.text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Writer:
    """One answer while it is generated.

    Args:
        thinks: True if the prompt has opened the think block already.

    Attributes:
        ended: True if no more tokens are wanted; if over_budget is True too, only the thought has ended.
        over_budget: True if a thinking budget is set, and it is used up, or the text has ended, within the thought.
    """

    def __init__(self, tokenizer: Tokenizer, thinks: bool, sampling: Sampling) -> None:
        self._tokenizer = tokenizer
        self._thinks = thinks
        self._sampling = sampling
        self._stream = TextStream(tokenizer)
        # The thought that the budget ended, and the number of its tokens.
        self._cut_thought: str | None = None
        self._before_cut = 0
        self._thought_tokens = 0
        self.ended = self.over_budget = False

    @property
    def tokens(self) -> int:
        """Number of tokens so far, the thought's included."""
        return self._before_cut + self._stream.tokens

    @property
    def so_far(self) -> Answer:
        """The answer so far, without an end that may still change."""
        thinking, answer = self._split()
        # The text may be the beginning of <think>, of a model that opens the block itself.
        if not answer or THINK_START.startswith(answer):
            return Answer("", thinking)
        stops = self._sampling.stop
        return Answer(cut_before(answer, stops) if has_stop(answer, stops) else certain(answer, stops), thinking)

    def push(self, ids: Sequence[int]) -> bool:
        """Append the next tokens, [] if the model has ended the text; return True if no more are wanted."""
        if not self.ended:
            self._stream.push(ids)
            self.ended = not ids or self._is_enough()
            self.over_budget = self.ended and self._sampling.thinking_budget > 0 and self._split()[1] is None
        return self.ended

    def close_thought(self) -> list[int]:
        """End the thought, so that the answer follows; return the ids of the text that has the model do so."""
        self._cut_thought = self._split()[0]
        self._before_cut = self._stream.tokens
        self._stream = TextStream(self._tokenizer)
        self._thought_tokens = 0
        self.ended = self.over_budget = False
        return self._tokenizer.encode(CLOSING, add_special_tokens=False)

    def end(self) -> Answer | None:
        """Return the whole answer; None if the model was still thinking."""
        self._stream.end()
        thinking, answer = self._split()
        return None if answer is None else Answer(cut_before(answer, self._sampling.stop).strip(), thinking)

    def _split(self) -> tuple[str, str | None]:
        if self._cut_thought is not None:
            return self._cut_thought, self._stream.text.strip()
        return split_thinking(self._stream.text, self._thinks)

    def _is_enough(self) -> bool:
        """Return True at a stop, or at the limit of the thought or of the answer: the token loop knows neither."""
        stops, budget = self._sampling.stop, self._sampling.thinking_budget
        if not (stops or budget):
            return False
        answer = self._split()[1]
        if not answer:
            # </think> and the empty line after it do not count as tokens of the answer.
            self._thought_tokens = self._stream.tokens
            return answer is None and 0 < budget <= self._thought_tokens
        if budget and self._stream.tokens - self._thought_tokens >= self._sampling.max_new_tokens:
            return True
        return has_stop(answer, stops)
