"""The progress of answers: the interface that is called with it, and the calls. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..request import Answer, Outcome


class Watch(Protocol):
    """The receiver of an answer's progress: ComfyUI's node, or the terminal."""

    def check(self) -> None:
        """Raise to cancel."""

    def stage(self, state: str, **facts: Any) -> None:
        """Report that a stage begins that takes time and has no count of progress.

        Args:
            state: "loading" a model, "reading" the question, or "asking" an engine.
            facts: for "loading" model and size in bytes; for "reading" the numbers of pictures and videos; for
                "asking" model.
        """

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None:
        """Report how many of the bytes of a model are there, of the total, and a line of text about it.

        Args:
            state: "downloading", or "checking" for files that were there already.
        """

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        """Report after every token: tokens so far, the answer so far, and the thought before it. Raise to cancel."""

    def advance(self, done: int, total: int | None, text: str) -> None:
        """Report, with several answers: how many are finished, of how many (None: not known), and the latest text."""

    def end(self, text: str) -> None:
        """Report the final answer, once."""


class NoWatch:
    """A watch that ignores all calls and never cancels."""

    def check(self) -> None: ...

    def stage(self, state: str, **facts: Any) -> None: ...

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None: ...

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None: ...

    def advance(self, done: int, total: int | None, text: str) -> None: ...

    def end(self, text: str) -> None: ...


class GrowingAnswer(Protocol):
    """One answer while it is generated."""

    @property
    def tokens(self) -> int:
        """Number of tokens so far, the thought's included."""

    @property
    def ended(self) -> bool:
        """True if no more tokens are wanted; if over_budget is True too, only the thought has ended."""

    @property
    def over_budget(self) -> bool:
        """True if its thought was cut short, so that the answer is still to come."""

    @property
    def so_far(self) -> Answer:
        """The answer so far, without an end that may still change."""


class TokenAnswer(GrowingAnswer, Protocol):
    """An answer whose tokens are generated here, not by an engine."""

    def push(self, ids: Sequence[int]) -> bool:
        """Append the next tokens, [] if the model has ended the text; return True if no more are wanted."""


class Reporter:
    """The calls of a run: to a watch with the progress, and to the caller with the result of each question.

    Args:
        done: called in this thread with the number of a question and its answer, as soon as its batch is finished.
        failed: called likewise with the number of a question and the error that it got instead of an answer.
        total: number of all questions; None if it is not known.
        single: True to report one answer token by token, False to report how many answers are finished.
    """

    def __init__(
        self,
        watch: Watch,
        done: Callable[[int, Answer], Any],
        failed: Callable[[int, Exception], Any],
        total: int | None = None,
        single: bool = False,
    ) -> None:
        self.watch = watch
        self._done = done
        self._failed = failed
        self._total = total
        self._single = single
        self._finished = 0
        self._latest = ""

    def update(self, answers: Sequence[GrowingAnswer]) -> None:
        """Report progress after every token; takes all answers that are being generated."""
        if self._single:
            (answer,) = answers
            so_far = answer.so_far
            self.watch.update(answer.tokens, so_far.text, so_far.thinking)
            return
        ended = [answer for answer in answers if answer.ended and not answer.over_budget]
        latest = ended[-1].so_far.text if ended else self._latest or answers[0].so_far.text
        self.watch.advance(self._finished + len(ended), self._total, latest)

    def finish(self, outcome: Outcome) -> None:
        """Pass on the result of a question."""
        if isinstance(outcome.result, Exception):
            self._failed(outcome.number, outcome.result)
        else:
            self._done(outcome.number, outcome.result)
            self._latest = outcome.result.text
            self._finished += 1


class TokenListener:
    """A callback for the tokens of a generation: it adds them to the answers and reports progress.

    It is no nested function, whose frame in the traceback of a cancel would keep the model alive by its closure.

    Args:
        rows: the answers of the generation's rows.
        everyone: all answers that are being generated.
    """

    def __init__(self, rows: Sequence[TokenAnswer], everyone: Sequence[GrowingAnswer], reporter: Reporter) -> None:
        self._rows = rows
        self._everyone = everyone
        self._reporter = reporter

    def __call__(self, new: Sequence[Sequence[int]]) -> list[int]:
        enough = [row for row, (writer, ids) in enumerate(zip(self._rows, new, strict=True)) if writer.push(ids)]
        self._reporter.update(self._everyone)
        return enough
