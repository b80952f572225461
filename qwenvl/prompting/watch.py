"""Who looks on while answers are made, and what is told of them. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..request import Answer, Outcome


class Watch(Protocol):
    """Who looks on while an answer is made: ComfyUI's node, or the terminal."""

    def check(self) -> None:
        """Raise to cancel."""

    def stage(self, state: str, **facts: Any) -> None:
        """When something begins that takes its time and of which nothing is counted.

        Args:
            state: "loading" a model (facts: model, size in bytes), "reading" the question (pictures, videos: how many),
                or "asking" an engine (model).
        """

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None:
        """While a model is downloaded: how many of how many bytes are there, and a line that says so."""

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        """After every token: how many there are, the answer so far, and the thought before it. Raise to cancel."""

    def advance(self, done: int, total: int | None, text: str) -> None:
        """The same with many answers: how many are finished of how many (None: nobody knows), and the latest."""

    def end(self, text: str) -> None:
        """Once, with the final answer."""


class Nobody:
    """A watch that looks at nothing and never cancels."""

    def check(self) -> None: ...

    def stage(self, state: str, **facts: Any) -> None: ...

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None: ...

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None: ...

    def advance(self, done: int, total: int | None, text: str) -> None: ...

    def end(self, text: str) -> None: ...


class GrowingAnswer(Protocol):
    """One answer while it is made."""

    @property
    def tokens(self) -> int:
        """How many there are, the thought's too."""

    @property
    def ended(self) -> bool:
        """Whether nothing more comes, of the thought at least."""

    @property
    def over_budget(self) -> bool:
        """Whether its thought was cut short, so that the answer is still to come."""

    @property
    def so_far(self) -> Answer:
        """What is certain of it."""


class TokenAnswer(GrowingAnswer, Protocol):
    """One that is made of tokens here."""

    def push(self, ids: Sequence[int]) -> bool:
        """Take the next tokens, none where the model has ended the text; returns whether it is enough."""


class Reporter:
    """Tells a watch how far the answers are, and whoever asked what came of each question.

    Args:
        done: called in this thread with the number of a question and its answer, as soon as its batch is finished.
        failed: the same with the error of a question that got none.
        total: questions in all; None where nobody knows.
        single: one answer is told token by token, of many how many are finished.
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
        """After every token, at all answers that are being made."""
        if self._single:
            (answer,) = answers
            so_far = answer.so_far
            self.watch.update(answer.tokens, so_far.text, so_far.thinking)
            return
        ended = [each for each in answers if each.ended and not each.over_budget]
        latest = ended[-1].so_far.text if ended else self._latest or answers[0].so_far.text
        self.watch.advance(self._finished + len(ended), self._total, latest)

    def finish(self, outcome: Outcome) -> None:
        """What came of a question."""
        if isinstance(outcome.result, Exception):
            self._failed(outcome.number, outcome.result)
        else:
            self._done(outcome.number, outcome.result)
            self._latest = outcome.result.text
            self._finished += 1


class TokenListener:
    """Hears the tokens of a generation: they become text, and are told. No function within a method: its frame in the
    traceback of a cancel would hold the model by what it closes over.

    Args:
        rows: whose tokens these are.
        everyone: all answers that are being made.
    """

    def __init__(self, rows: Sequence[TokenAnswer], everyone: Sequence[GrowingAnswer], reporter: Reporter) -> None:
        self._rows = rows
        self._everyone = everyone
        self._reporter = reporter

    def __call__(self, new: Sequence[Sequence[int]]) -> list[int]:
        enough = [row for row, (writer, ids) in enumerate(zip(self._rows, new, strict=True)) if writer.push(ids)]
        self._reporter.update(self._everyone)
        return enough
