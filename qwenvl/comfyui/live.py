"""What is told of a run while it goes on: how far it is, how fast, and the thought so far. Standard library only."""

from __future__ import annotations

import time
from typing import Any


class Live:
    """Counts what is made, and measures how fast since it first saw some."""

    def __init__(self) -> None:
        self._thinking = ""
        self._done: int | None = None
        self._unit = ""
        self._first: tuple[float, int] | None = None
        self._per_s: float | None = None

    def count(self, done: int, unit: str, thinking: str = "") -> None:
        """So many of them are there now."""
        now = time.monotonic()
        self._done, self._unit, self._thinking = done, unit, thinking
        # What came before the first count is not counted: reading pictures would make the first tokens look slow.
        start, before = self._first = self._first or (now, done)
        if done > before and now > start:
            self._per_s = (done - before) / (now - start)

    def told(self, node_id: str) -> dict[str, Any]:
        """The same as the page is told it."""
        return {
            "node": node_id,
            "thinking": self._thinking,
            "done": self._done,
            "unit": self._unit,
            "per_s": self._per_s,
        }
