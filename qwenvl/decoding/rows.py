"""The result of a generation: the tokens of each row, when they came, and how they were computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import NotFiniteError

# Stands for a token that could not be chosen because the row's logits hold NaN or infinity.
NO_TOKEN = -1
# Called with the new tokens of each row as soon as they are known, an empty list for a row that the model has ended.
# It may return rows that are to end too; the loop stops if it raises.
OnTokens = Callable[[Sequence[Sequence[int]]], Iterable[int] | None]


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Times of one step, in seconds of time.perf_counter(): when its tokens arrived, and when on_tokens returned."""

    arrived: float
    returned: float


@dataclass(frozen=True, slots=True)
class Generation:
    """The new token ids of each row without the one that ended it, and how they were computed."""

    rows: tuple[tuple[int, ...], ...]
    prefill_s: float
    decode_s: float
    # Tokens of all rows, without the first of each row; the tokens that ended a row are counted.
    steps: int
    tier: str
    tier_reason: str
    reused_tokens: int = 0
    # One entry for each step.
    times: Sequence[TokenTime] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the only row; ValueError if there are several."""
        (row,) = self.rows
        return row

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all rows per second of the loop, without the first tokens, which belong to the prefill."""
        return self.steps / self.decode_s if self.steps and self.decode_s > 0 else 0.0


class Rows:
    """The tokens of each row, passed to on_tokens as they come, and their times."""

    def __init__(self, batch: int, end_ids: frozenset[int], on_tokens: OnTokens) -> None:
        # Includes the token that ended a row.
        self.all_ids: list[list[int]] = [[] for _ in range(batch)]
        self.steps = 0
        # True if the logits of any row held NaN or infinity.
        self.unsound = False
        self.ended = [False] * batch
        self._end_ids = end_ids
        self._on_tokens = on_tokens
        self._times: list[TokenTime] = []
        self._start = self._first = self._last = time.perf_counter()

    @property
    def all_ended(self) -> bool:
        """True if every row has ended."""
        return all(self.ended)

    def push(self, tokens: list[int]) -> None:
        """Take the next token of each row.

        Raises:
            NotFiniteError: a row that has not ended has no token; on_tokens is not called with this step.
        """
        self._last = time.perf_counter()
        if NO_TOKEN in tokens:
            self._note_missing(tokens)
        if not self.steps:
            self._first = self._last
        self.steps += 1
        new: list[list[int]] = [[] for _ in tokens]
        for row, token in enumerate(tokens):
            if self.ended[row]:
                continue
            self.all_ids[row].append(token)
            self.ended[row] = token in self._end_ids
            if not self.ended[row]:
                new[row].append(token)
        for row in self._on_tokens(new) or ():
            self.ended[row] = True
        self._times.append(TokenTime(self._last, time.perf_counter()))

    def _note_missing(self, tokens: list[int]) -> None:
        """Raise NotFiniteError for rows without a token; rows that have ended only mark the buffers as unsound."""
        self.unsound = True
        if rows := [row for row, token in enumerate(tokens) if token == NO_TOKEN and not self.ended[row]]:
            raise NotFiniteError(rows, self.steps)

    def generation(self, tier: str, reason: str, reused: int) -> Generation:
        """Return the result so far."""
        ids = tuple(tuple(row[:-1] if row[-1] in self._end_ids else row) for row in self.all_ids)
        prefill, loop = self._first - self._start, self._last - self._first
        steps = sum(len(row) - 1 for row in self.all_ids)
        return Generation(ids, prefill, loop, steps, tier, reason, reused, self._times)
