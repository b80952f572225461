"""Asks a model that is already loaded, with a run's own session, but without a cache and a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from qwenvl.loading.loader import ModelHandle
from qwenvl.prompting.prompt import Prompt
from qwenvl.prompting.watch import GrowingAnswer, NoWatch, Reporter
from qwenvl.report.diagnostics import Diagnosis
from qwenvl.request import Answer, DecodeStats, LoadSpec, LoadStats, PromptStats, Question, Request, Sampling, Stats
from qwenvl.session import ModelSession
from qwenvl.settings import AS_SET


def ignore(*_: object) -> None:
    pass


class Loaded:
    """A double of the cache that holds the model, and of the source that it came from.

    Args:
        free_memory: called if not even one answer fits.
    """

    def __init__(self, handle: ModelHandle, free_memory: Callable[[], None]) -> None:
        self._handle = handle
        self._free_memory = free_memory

    def source(self, spec: LoadSpec) -> Loaded:
        return self

    def get(self, source: Loaded, request_bytes: int, check: Callable[[], None]) -> ModelHandle:
        return self._handle

    @property
    def held(self) -> list[LoadSpec]:
        return [self._handle.spec]

    def free_memory(self, spec: LoadSpec, request_bytes: int) -> None:
        self._free_memory()

    def sampled(self, request: Request) -> Request:
        return request

    def request_bytes(self, tokens: int, prompt_tokens: int) -> int:
        return 1

    def out_of_memory(self, doing: str, request: int) -> MemoryError:
        return MemoryError("there is no room for a single answer")


def ask(
    handle: ModelHandle,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    most: int = 16,
    look: Callable[[Sequence[GrowingAnswer]], None] = ignore,
    free_memory: Callable[[], None] = ignore,
) -> tuple[list[Answer | Exception], Stats]:
    """Answer every prompt; return the outcomes, in order, and the figures of all.

    Args:
        most: most prompts at a time.
        look: called after every token with the unfinished answers.
    """
    request = Request(handle.spec, "", sampling=sampling)
    reporter = Reporter(NoWatch(), ignore, ignore)
    reporter.update = look
    with ModelSession(request, Loaded(handle, free_memory), NoWatch(), Diagnosis("off"), most) as session:
        session.load(Question(0, []), len(prompts))
        numbered = [replace(prompt, number=number) for number, prompt in enumerate(prompts)]
        outcomes = list(session.generate(numbered, reporter))
        stats = session.stats()
    assert [outcome.number for outcome in outcomes] == list(range(len(prompts)))
    return [outcome.result for outcome in outcomes], stats


def stats_of(**figures: object) -> Stats:
    """Make the statistics of a run from the given figures, by their names in the JSON; the others do not matter."""
    loaded = LoadStats("m", "cpu", "float32", "none", "sdpa", "sdpa", (), 0.0)
    prompt = PromptStats(0, 0, 0.0, 0.0)
    decode = DecodeStats(1, 1, 0, 0.0, 0, "own step", "", Sampling(), AS_SET, None)
    parts = [_changed(part, figures) for part in (loaded, prompt, decode)]
    stats = _changed(Stats(*parts, peak_bytes=0, total_s=0.0), figures)
    assert not figures, f"there is no figure {list(figures)}"
    return stats


def _changed(part: Any, figures: dict[str, object]) -> Any:
    return replace(part, **{field.name: figures.pop(field.name) for field in fields(part) if field.name in figures})
