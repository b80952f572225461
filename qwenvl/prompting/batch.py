"""Several questions at a time: how many fit into memory, reading the next pictures meanwhile, and their seeds."""

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
from .processed import PIXELS
from .prompt import Prompt

# More rows than this gain little, and every row has to wait for the longest answer.
MOST_ROWS = 16
# Share of the free memory that a batch may use: others need some, and estimates err.
USED_SHARE = 0.8
# Threads that read pictures.
READERS = 2
# Most bytes of decoded pictures that wait, beside those being read: five of 12 megapixels. That is enough, because a
# batch of photos takes longer to answer than to read.
AHEAD_BYTES = 256 << 20
# Most bytes of pictures in a batch's inputs. Only pictures in original size reach it: 16 others take a third of it.
BATCH_BYTES = 1 << 30
# Pillow stores an RGB pixel in four bytes.
_BYTES_PER_PIXEL = 4


class BatchLimit:
    """The number of questions that fit into memory at a time.

    Args:
        free: free bytes beside the weights.
        bytes_of: (tokens of a row, tokens of its prompt) -> bytes that the row needs.
        longest: the most tokens of an answer.
        most: most rows, even if more would fit.
    """

    def __init__(self, free: int, bytes_of: Callable[[int, int], int], longest: int, most: int) -> None:
        self._free = USED_SHARE * free
        self._bytes_of = bytes_of
        self._longest = longest
        self.most = most

    def fits(self, prompts: Sequence[Prompt]) -> bool:
        """Return True if these questions fit together; always True for a single one, which is tried in any case."""
        tokens, shown = max(prompt.tokens for prompt in prompts), sum(map(shown_bytes, prompts))
        # Half as much again, because a buffer that grows is copied.
        row = self._bytes_of(capacity_for(tokens + self._longest) * 3 // 2, tokens)
        # Twice `shown`, because pictures are copied when they are joined to a batch.
        needed = len(prompts) * row + 2 * shown
        return len(prompts) == 1 or (len(prompts) <= self.most and needed <= self._free and shown <= BATCH_BYTES)

    def halve(self, tried: int) -> None:
        """Lower `most` to half of `tried`, a number of questions that did not fit."""
        self.most = max(1, tried // 2)
        log.warning("%d answers at a time need too much memory: going on with %d", tried, self.most)


def shown_bytes(prompt: Prompt) -> int:
    """Return the bytes of the prompt's pictures and videos."""
    return sum(prompt.inputs[key].nbytes for key in PIXELS if key in prompt.inputs)


class _Room:
    """A limit for readers: they wait while `most` bytes of pictures wait to be taken, except the next one in order."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._held: dict[int, int] = {}
        self._next = 0
        self._closed = False

    def enter(self, number: int) -> bool:
        """Wait until this item may be read; False if it is no longer wanted."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or number <= self._next or sum(self._held.values()) < self._most
            )
            return not self._closed

    def put(self, number: int, pictures: Sequence[Image.Image]) -> None:
        """Count the pictures of an item that was read."""
        with self._changed:
            self._held[number] = sum(picture.width * picture.height * _BYTES_PER_PIXEL for picture in pictures)

    def take(self, number: int) -> None:
        """Note that an item, read or not, was taken by the caller of read_ahead(), and no longer waits."""
        with self._changed:
            self._held.pop(number, None)
            self._next = number + 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let all readers end: nothing more is wanted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def read_ahead(
    items: Iterable[tuple[str, Any]], depth: int, most_bytes: int = AHEAD_BYTES
) -> Generator[Question | Outcome]:
    """Yield for every item, in order, the question about its picture, or an Outcome that says why it cannot be read.

    The next `depth` items are read meanwhile.

    Args:
        items: a name for messages, and a picture: a file's path, an IMAGE tensor, a PIL image, or a function that
            returns one of these and is called in another thread.
        most_bytes: bytes of decoded pictures from which on no further picture is begun.
    """
    waiting: deque[tuple[int, Future[list[Image.Image]]]] = deque()
    readers, room = ThreadPoolExecutor(READERS, "qwenvl-read"), _Room(most_bytes)
    try:
        for number, (name, item) in enumerate(items):
            waiting.append((number, readers.submit(_read, room, number, name, item)))
            if len(waiting) > depth:
                yield _taken(room, *waiting.popleft())
        while waiting:
            yield _taken(room, *waiting.popleft())
    finally:
        room.close()
        readers.shutdown(cancel_futures=True)


def _read(room: _Room, number: int, name: str, item: Any) -> list[Image.Image]:
    if not room.enter(number):
        return []
    pictures = media.pictures({name: item() if callable(item) else item})
    room.put(number, pictures)
    return pictures


def _taken(room: _Room, number: int, reading: Future[list[Image.Image]]) -> Question | Outcome:
    try:
        return Question(number, reading.result())
    except (media.MediaError, OSError) as error:
        return Outcome(number, error)
    finally:
        room.take(number)


def run_seed(sampling: Sampling) -> int | None:
    """Return the seed of a run, a random one if the setting is -1; None for greedy sampling, which needs no seed."""
    if sampling.greedy:
        return None
    return secrets.randbits(53) if sampling.seed == -1 else sampling.seed


# Step of later_seed() for an answer after a thought that was cut; larger than the number of pictures in any folder, as
# those are steps too.
AFTER_A_CUT = 1 << 32


def later_seed(seed: int | None, step: int) -> int | None:
    """Return a seed for another part of the same run, so that it does not draw the same random numbers."""
    return None if seed is None else (seed + step) % (MAX_SEED + 1)
