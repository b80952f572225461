"""State that outlives every run, owned by one object, PROCESS. Standard library only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

# How often a run that waits for another one checks for a cancel.
LOOK_EVERY_S = 0.1


def _never() -> None:
    """Never cancel."""


class Turns:
    """A lock that lets one run work at a time, and calls that wait until no run is under way."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._running = 0
        self._later: deque[Callable[[], None]] = deque()

    def take(self, check: Callable[[], None] = _never) -> None:
        """Wait until no other thread works with a model, then begin a run.

        Args:
            check: called every LOOK_EVERY_S seconds of waiting; raises to cancel.
        """
        while not self._lock.acquire(timeout=LOOK_EVERY_S):
            check()
        self._running += 1

    def end(self) -> None:
        """End the run, and make the calls that waited for it."""
        self._running -= 1
        self._lock.release()
        self._do_later()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager that keeps other threads from working with a model; reentrant in the thread of a run."""
        try:
            with self._lock:
                yield
        finally:
            self._do_later()

    def when_idle(self, then: Callable[[], None]) -> None:
        """Call then now if no run is under way; otherwise the running thread calls it at the end of its run.

        Never blocks, because the garbage collector may call this in any thread, at any point.
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
                return  # a garbage collection in between has emptied the queue
            finally:
                self._lock.release()


class Shared:
    """A lock that many users may hold at a time, and one changer while no user holds it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Context manager during which no other thread changes the guarded thing."""
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
        """Context manager during which no other thread uses the guarded thing."""
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0)
            yield


class Models(Protocol):
    """A cache of models."""

    def clear(self) -> None:
        """Unload all models."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a run generated tokens, and the length of its prompt."""

    tokens_per_s: float
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Process:
    """The state of this process that no run and no node owns.

    Attributes:
        models: every cache of models: they share the devices, so a lost GPU breaks all of them.
        turns: the lock for work with models, one for all caches: while transformers loads a model, it changes torch's
            default dtype and how modules are created, for every thread. Another load or an answer at the same time
            would use these settings or leave them behind.
        logged: keys of messages that were logged and are not repeated.
        fastest: the best pace of each kind of run.
        unknown_fields: by address and model, request fields that an engine does not know: sending them again would
            cost a refused request with all pictures of the question.
        pillow: the lock of its readers: how Pillow treats a damaged file is one switch for every thread.
        engine_kinds: by address and model, the kind of engine; "" if it could not be determined.
        opens_thought: by address, model and the setting thinking, True if the engine's prompts end in an open think
            block.
    """

    models: WeakSet[Models] = field(default_factory=WeakSet)
    turns: Turns = field(default_factory=Turns)
    logged: set[Hashable] = field(default_factory=set)
    fastest: dict[Hashable, Pace] = field(default_factory=dict)
    pillow: Shared = field(default_factory=Shared)
    unknown_fields: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    engine_kinds: dict[tuple[str, str], str] = field(default_factory=dict)
    opens_thought: dict[tuple[str, str, str], bool] = field(default_factory=dict)

    def is_new(self, *what: Hashable) -> bool:
        """Return True the first time it is called with this key, False from then on."""
        new = what not in self.logged
        self.logged.add(what)
        return new


PROCESS = Process()
