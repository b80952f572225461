"""One run at a time in this process, and what has to wait until none is under way. Standard library only."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Whoever waits for another run looks this often whether it was cancelled.
LOOK_EVERY_S = 0.1


def _never() -> None:
    """Nobody can cancel."""


class Turns:
    """Who may work with models now."""

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
