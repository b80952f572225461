"""What outlives every run: one object owns all of it. Standard library only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

# Whoever waits for another run looks this often whether it was cancelled.
LOOK_EVERY_S = 0.1


def _never() -> None:
    """Nobody can cancel."""


class Turns:
    """One run at a time, and what has to wait until none is under way."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._running = 0
        self._later: deque[Callable[[], None]] = deque()

    def take(self, check: Callable[[], None] = _never) -> None:
        """Wait until no other thread works with a model, and begin a run.

        Args:
            check: called while this waits; raises to cancel.
        """
        while not self._lock.acquire(timeout=LOOK_EVERY_S):
            check()
        self._running += 1

    def end(self) -> None:
        """End the run; what had to wait for that is done."""
        self._running -= 1
        self._lock.release()
        self._do_later()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A block during which no other thread works with a model; in the thread of a run it is part of that run."""
        try:
            with self._lock:
                yield
        finally:
            self._do_later()

    def when_idle(self, then: Callable[[], None]) -> None:
        """Call then: now, or in the thread whose run is under way, at its end.

        Never waits. The garbage collector may call this, in any thread and in the middle of anything.
        """
        self._later.append(then)
        self._do_later()

    def _do_later(self) -> None:
        while self._later and self._lock.acquire(blocking=False):
            try:
                if self._running:
                    return
                self._later.popleft()()
            except IndexError:
                return  # a garbage collection just now has done it
            finally:
                self._lock.release()


class Shared:
    """What many threads may use at a time, and one may change while no other uses it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """A block during which nobody changes it."""
        with self._changed:
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A block during which nobody else uses it."""
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0)
            yield


class Models(Protocol):
    """A cache of models."""

    def clear(self) -> None:
        """Let all of them go."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a run made its tokens."""

    tokens_per_s: float
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Process:
    """The state of this process that no run and no node owns.

    Attributes:
        models: every cache of models: they share the devices, so what breaks one breaks all.
        turns: who may work with models now. Of all caches: while transformers loads a model, torch's default precision
            and its own way to make modules are others, for every thread. A second load meanwhile would leave them so,
            and an answer would be computed with them.
        told: what was said and is not said again.
        fastest: the best pace of each kind of run.
        unknown_fields: by address and model, what an engine turned out not to know: asking again costs all pictures
            of a question a second time.
        pillow: its readers. How it takes a damaged file is one switch, which holds for every thread.
        engine_kinds: by address and model, what kind of engine it is; "" where that cannot be told.
        opens_thought: by address, model and the setting of thinking, whether an engine's prompts end in an open think
            block.
    """

    models: WeakSet[Models] = field(default_factory=WeakSet)
    turns: Turns = field(default_factory=Turns)
    told: set[Hashable] = field(default_factory=set)
    fastest: dict[Hashable, Pace] = field(default_factory=dict)
    pillow: Shared = field(default_factory=Shared)
    unknown_fields: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    engine_kinds: dict[tuple[str, str], str] = field(default_factory=dict)
    opens_thought: dict[tuple[str, str, str], bool] = field(default_factory=dict)

    def is_new(self, *what: Hashable) -> bool:
        """Whether this was not told before; from now on it was."""
        new = what not in self.told
        self.told.add(what)
        return new


PROCESS = Process()
