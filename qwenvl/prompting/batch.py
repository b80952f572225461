"""Several questions at a time: how many fit, reading the next pictures meanwhile, and a seed for each."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from PIL import Image

from ..decoding.kv_cache import capacity_for
from ..log import log
from ..media import media
from ..request import Outcome, Question, Sampling
from ..settings import MAX_SEED
from .prompt import Prompt

# More rows than this gain little, and each has to wait for the longest answer of all.
MOST_ROWS = 16
# What is left of the memory that is free: others need some, and estimates err.
USED_SHARE = 0.8
READERS = 2


class BatchLimit:
    """How many questions fit into memory at a time.

    Args:
        free: bytes beside the weights.
        bytes_of: (tokens of a row, of its prompt) -> bytes.
        longest: the most tokens of an answer.
        most: rows, however much is free.
    """

    def __init__(self, free: int, bytes_of: Callable[[int, int], int], longest: int, most: int) -> None:
        self._free = USED_SHARE * free
        self._bytes_of = bytes_of
        self._longest = longest
        self.most = most

    def fits(self, prompts: Sequence[Prompt]) -> bool:
        """Whether these fit; a single one always does, for it is to be tried."""
        tokens = max(prompt.tokens for prompt in prompts)
        # Half as much again: a buffer that grows is copied.
        row = self._bytes_of(capacity_for(tokens + self._longest) * 3 // 2, tokens)
        return len(prompts) == 1 or (len(prompts) <= self.most and len(prompts) * row <= self._free)

    def halve(self, tried: int) -> None:
        """So many did not fit."""
        self.most = max(1, tried // 2)
        log.warning("%d answers at a time need too much memory: going on with %d", tried, self.most)


def read_ahead(items: Iterable[tuple[str, Any]], depth: int) -> Generator[Question | Outcome]:
    """The question about each item's picture, or why it cannot be read, in order; the next `depth` are read meanwhile.

    Args:
        items: a name for messages, and a picture: a file's path, an IMAGE tensor, a PIL image, or a function that
            returns one of these and is called in another thread.
    """
    waiting: deque[tuple[int, Future[list[Image.Image]]]] = deque()
    readers = ThreadPoolExecutor(READERS, "qwenvl-read")
    try:
        for number, (name, item) in enumerate(items):
            waiting.append((number, readers.submit(_read, name, item)))
            if len(waiting) > depth:
                yield _made(*waiting.popleft())
        while waiting:
            yield _made(*waiting.popleft())
    finally:
        readers.shutdown(cancel_futures=True)


def _read(name: str, item: Any) -> list[Image.Image]:
    return media.pictures({name: item() if callable(item) else item})


def _made(number: int, reading: Future[list[Image.Image]]) -> Question | Outcome:
    try:
        return Question(number, reading.result())
    except (media.MediaError, OSError) as error:
        return Outcome(number, error)


def run_seed(sampling: Sampling) -> int | None:
    """The seed of a run, a new one where -1 asks for it; None where it would have no effect."""
    if sampling.greedy:
        return None
    return secrets.randbits(53) if sampling.seed == -1 else sampling.seed


def later_seed(seed: int | None, step: int) -> int | None:
    """Another seed for another part of the same run, so that it does not draw the same numbers."""
    return None if seed is None else (seed + step) % (MAX_SEED + 1)
