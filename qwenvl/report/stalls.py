"""The pace of tokens: how evenly they came, where they stalled, and what else the process did meanwhile."""

from __future__ import annotations

import gc
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

from ..decoding.rows import TokenTime

# An interval over this many times the median is a stall.
STALL = 2
LOOK_EVERY_S = 0.05
# A thread whose innermost function is in one of these files of Python's is waiting.
WAITING = {"threading.py", "selectors.py", "queue.py", "socket.py", "ssl.py", "thread.py", "connection.py"}


class StackSampler:
    """A thread that samples the stacks of all others, every LOOK_EVERY_S seconds, and times garbage collections.

    It costs the token loop only Python's switches between threads.
    """

    def __init__(self) -> None:
        self._watched = threading.get_ident()
        self._looks: list[tuple[float, list[str]]] = []
        self._collections: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="qwenvl-sampler", daemon=True)

    def __enter__(self) -> StackSampler:
        gc.callbacks.append(self._collected)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._collected)
        self._done.set()
        self._thread.join()

    def between(self, start: float, end: float) -> list[str]:
        """List what went on between two times of time.perf_counter(), in the order in which it was first seen."""
        found = [f"garbage collection for {1000 * (b - a):.0f} ms" for a, b in self._collections if start < b <= end]
        looks = [places for at, places in self._looks if start <= at <= end]
        if not looks and end - start > 3 * LOOK_EVERY_S:
            found.append("something that lets no other Python code run")
        return list(dict.fromkeys([*found, *(place for places in looks for place in places)]))

    def _look(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            self._looks.append((time.perf_counter(), self._places()))

    def _places(self) -> list[str]:
        """List where each thread is now. Keeps no frame, because frames keep everything alive that a run holds."""
        names = {thread.ident: f"thread {thread.name}" for thread in threading.enumerate()}
        names[self._watched] = "this run"
        names.pop(threading.get_ident(), None)
        return [
            f"{names[ident]} in {_place(frame)}"
            for ident, frame in sys._current_frames().items()
            if ident in names and (ident == self._watched or not _waits(frame))
        ]

    def _collected(self, phase: str, _: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._collections.append((now, now))
        elif self._collections:
            self._collections[-1] = (self._collections[-1][0], now)


def pace(generations: Sequence[Sequence[TokenTime]], sampler: StackSampler | None = None) -> dict[str, Any]:
    """Measure how evenly tokens came.

    Args:
        generations: the times of the tokens of each generation.
        sampler: what watched the process meanwhile, if anything did.

    Returns:
        shortest_ms, median_ms, longest_ms; and stalls, each with the numbers of the generation and of the token after
        which it came, its length, how much of it went to showing that token, and what was seen meanwhile. Empty if no
        token followed another.
    """
    intervals = [interval for times in generations for interval in _intervals_ms(times)]
    if not intervals:
        return {}
    median = statistics.median(intervals)
    stalls = [
        {"generation": number, **stall}
        for number, times in enumerate(generations, 1)
        for stall in _stalls(times, STALL * median, sampler)
    ]
    return {"shortest_ms": min(intervals), "median_ms": median, "longest_ms": max(intervals), "stalls": stalls}


def telling_s(times: Sequence[TokenTime]) -> float:
    """Sum the seconds spent showing tokens: decoding their text, updating progress and live text."""
    return sum(token.returned - token.arrived for token in times)


def _intervals_ms(times: Sequence[TokenTime]) -> list[float]:
    return [1000 * (later.arrived - earlier.arrived) for earlier, later in pairwise(times)]


def _stalls(times: Sequence[TokenTime], over_ms: float, sampler: StackSampler | None) -> list[dict[str, Any]]:
    return [
        {
            "after_token": number,
            "ms": length,
            "telling_ms": 1000 * (before.returned - before.arrived),
            "meanwhile": sampler.between(before.arrived, after.arrived) if sampler else [],
        }
        for number, (before, after) in enumerate(pairwise(times), 1)
        if (length := 1000 * (after.arrived - before.arrived)) > over_ms
    ]


def _place(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    return f"{file.parent.name}/{file.name} {frame.f_code.co_name}()"


def _waits(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).name in WAITING
