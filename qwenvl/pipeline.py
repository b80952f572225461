"""START HERE: questions from request to result, in five steps: read, load, encode, generate, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import chain
from operator import length_hint
from typing import Any

from . import session
from .loading.cache import ModelCache
from .media import media
from .media.content import convert
from .packages import naming_what_is_missing
from .prompting import prompt
from .prompting.batch import MOST_ROWS, read_ahead
from .prompting.watch import Reporter, Watch
from .report.diagnostics import Diagnosis
from .request import Answer, Outcome, Question, Request, Result, Stats
from .session import Session
from .settings import IMAGE_MODES


@naming_what_is_missing()
def run(request: Request, models: ModelCache, watch: Watch) -> Result:
    """Answer one request: one question about everything, or the same question about each picture.

    Raises:
        ValueError, RuntimeError: their subclasses in checks, errors, faults and the rooms, which say what was asked,
            why it is not possible and what to do; and whatever watch raises to cancel.
    """
    answers: dict[int, Answer] = {}
    diagnosis = Diagnosis(request.diagnostics)
    with session.opened(request, models, watch, diagnosis) as asked:
        prompt.require_question(request)
        with diagnosis.phases("media"):
            pictures = media.shown_pictures(request.images, watch.check)
        one_by_one = request.image_mode != IMAGE_MODES[0] and bool(pictures)
        shown = [[picture] for picture in pictures] if one_by_one else [pictures]
        if len(shown) > 1:
            # Several answers keep nothing that a next run could recognise.
            with diagnosis.phases("media"):
                convert(pictures, (), watch.check)
        questions = (Question(number, some) for number, some in enumerate(shown))
        total = len(shown) if one_by_one else None
        reporter = Reporter(watch, answers.__setitem__, _raise, total, single=not one_by_one)
        _answer(asked, questions, len(shown), reporter)
        stats = asked.stats()
    result = Result(tuple(answers[number] for number in sorted(answers)), stats)
    watch.end("\n\n".join(answer.text for answer in result.answers))
    return result


@naming_what_is_missing()
def caption(
    request: Request,
    items: Iterable[tuple[str, Any]],
    models: ModelCache,
    watch: Watch,
    batch_size: int | None = None,
    done: Callable[[int, Answer], Any] = lambda *_: None,
    failed: Callable[[int, Exception], Any] = lambda *_: None,
) -> Stats | None:
    """Ask the request's question about each picture, several at a time, while the next ones are being read.

    Args:
        request: its images are ignored; its videos are shown beside every picture.
        items: a name for messages, and a picture: a file's path, an IMAGE tensor, a PIL image, or a function that
            returns one of these and is called in another thread. Any length; read lazily.
        batch_size: pictures at a time; None takes what fits into free memory.
        done: called in this thread with the index of an item and its answer, as soon as its batch is finished.
        failed: called likewise with the error of a picture that could not be read or answered; the run goes on.

    Returns:
        The figures of the whole run; None if no picture could be asked about.
    """
    reporter = Reporter(watch, done, failed, length_hint(items) or None)
    expected = batch_size or MOST_ROWS
    with (
        session.opened(request, models, watch, Diagnosis(request.diagnostics), batch_size) as asked,
        closing(read_ahead(items, depth=2 * expected)) as questions,
    ):
        return asked.stats() if _answer(asked, questions, expected, reporter) else None


def _answer(asked: Session, questions: Iterable[Question | Outcome], expected: int, reporter: Reporter) -> bool:
    """Run the five steps: read, load, encode, generate, report. Pictures are read ahead; videos are read by load.

    Args:
        expected: the number of questions to reserve memory for.

    Returns:
        False if no question could be read.
    """
    readable = _readable(questions, reporter)
    first = next(readable, None)
    if first is None:
        return False
    asked.load(first, expected)
    # Keep no reference to the first question: its pictures would stay in memory for the whole run.
    waiting = chain(iter([first]), readable)
    del first
    for batch in asked.encode(waiting):
        for outcome in asked.generate(batch, reporter):  # reports every token
            reporter.finish(outcome)
    return True


def _readable(questions: Iterable[Question | Outcome], reporter: Reporter) -> Iterator[Question]:
    """Yield the questions that could be read; report the others as failed."""
    for question in questions:
        if isinstance(question, Outcome):
            reporter.finish(question)
        else:
            yield question


def _raise(number: int, error: Exception) -> None:
    raise error
