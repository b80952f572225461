"""Several questions at a time: how many fit, reading the next pictures meanwhile, and a seed for each."""

from __future__ import annotations

import secrets
import threading
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
from .prompt import PIXELS, Prompt

# More rows than this gain little, and each has to wait for the longest answer of all.
MOST_ROWS = 16
# What is left of the memory that is free: others need some, and estimates err.
USED_SHARE = 0.8
READERS = 2
# Of decoded pictures that wait, beside those in the readers' hands; five of 12 megapixels. A batch of photos takes
# longer to answer than its pictures to read.
AHEAD_BYTES = 256 << 20
# Of what a batch shows its model. Only pictures in their original size reach it: others of 16 rows are a third of it.
BATCH_BYTES = 1 << 30
# Pillow holds a pixel of RGB in four.
_BYTES_PER_PIXEL = 4


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
        tokens, shown = max(prompt.tokens for prompt in prompts), sum(map(shown_bytes, prompts))
        # Half as much again: a buffer that grows is copied.
        row = self._bytes_of(capacity_for(tokens + self._longest) * 3 // 2, tokens)
        # What is shown is there twice while it is put side by side.
        needed = len(prompts) * row + 2 * shown
        return len(prompts) == 1 or (len(prompts) <= self.most and needed <= self._free and shown <= BATCH_BYTES)

    def halve(self, tried: int) -> None:
        """So many did not fit."""
        self.most = max(1, tried // 2)
        log.warning("%d answers at a time need too much memory: going on with %d", tried, self.most)


def shown_bytes(prompt: Prompt) -> int:
    """What the model is shown takes so many."""
    return sum(prompt.inputs[key].nbytes for key in PIXELS if key in prompt.inputs)


class _Room:
    """Lets readers go on while less than so many bytes wait to be taken, and whoever is next in any case."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._held: dict[int, int] = {}
        self._next = 0
        self._closed = False

    def enter(self, number: int) -> bool:
        """Wait until this one may be read; whether it is wanted still."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or number <= self._next or sum(self._held.values()) < self._most
            )
            return not self._closed

    def put(self, number: int, pictures: Sequence[Image.Image]) -> None:
        """It was read."""
        with self._changed:
            self._held[number] = sum(each.width * each.height * _BYTES_PER_PIXEL for each in pictures)

    def take(self, number: int) -> None:
        """It is the reader's no longer, read or not."""
        with self._changed:
            self._held.pop(number, None)
            self._next = number + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more is wanted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def read_ahead(
    items: Iterable[tuple[str, Any]], depth: int, most_bytes: int = AHEAD_BYTES
) -> Generator[Question | Outcome]:
    """The question about each item's picture, or why it cannot be read, in order; the next `depth` are read meanwhile.

    Args:
        items: a name for messages, and a picture: a file's path, an IMAGE tensor, a PIL image, or a function that
            returns one of these and is called in another thread.
        most_bytes: of decoded pictures, from which on no further one is begun.
    """
    waiting: deque[tuple[int, Future[list[Image.Image]]]] = deque()
    readers, room = ThreadPoolExecutor(READERS, "qwenvl-read"), _Room(most_bytes)
    try:
        for number, (name, item) in enumerate(items):
            waiting.append((number, readers.submit(_read, room, number, name, item)))
            if len(waiting) > depth:
                yield _made(room, *waiting.popleft())
        while waiting:
            yield _made(room, *waiting.popleft())
    finally:
        room.close()
        readers.shutdown(cancel_futures=True)


def _read(room: _Room, number: int, name: str, item: Any) -> list[Image.Image]:
    if not room.enter(number):
        return []
    made = media.pictures({name: item() if callable(item) else item})
    room.put(number, made)
    return made


def _made(room: _Room, number: int, reading: Future[list[Image.Image]]) -> Question | Outcome:
    try:
        return Question(number, reading.result())
    except (media.MediaError, OSError) as error:
        return Outcome(number, error)
    finally:
        room.take(number)


def run_seed(sampling: Sampling) -> int | None:
    """The seed of a run, a new one where -1 asks for it; None where it would have no effect."""
    if sampling.greedy:
        return None
    return secrets.randbits(53) if sampling.seed == -1 else sampling.seed


# As a step of later_seed: no folder has so many pictures.
AFTER_A_CUT = 1 << 32


def later_seed(seed: int | None, step: int) -> int | None:
    """Another seed for another part of the same run, so that it does not draw the same numbers."""
    return None if seed is None else (seed + step) % (MAX_SEED + 1)
