"""What a generation collects: the tokens of each row, when they came, and how they were made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import NotFiniteError

# In place of a token that could not be chosen, because the row's logits are no numbers.
NO_TOKEN = -1
# Called with the new tokens of each row as soon as they are known, none for one that the model has ended. It may
# return rows that are to end too; raising in it stops the loop.
OnTokens = Callable[[Sequence[Sequence[int]]], Iterable[int] | None]


@dataclass(frozen=True, slots=True)
class TokenTime:
    """Of one step, in seconds of time.perf_counter(): when its tokens were there, and when they had been told."""

    arrived: float
    told: float


@dataclass(frozen=True, slots=True)
class Generation:
    """The new token ids of each row, the one that ended it left out, and how they were made."""

    rows: tuple[tuple[int, ...], ...]
    prefill_s: float
    decode_s: float
    # Tokens of all rows after the first of each, those that ended a row among them.
    steps: int
    tier: str
    tier_reason: str
    reused_tokens: int = 0
    # One of each step.
    times: Sequence[TokenTime] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of a single row."""
        (row,) = self.rows
        return row

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all rows per second of the loop alone: the first token belongs to the prefill."""
        return self.steps / self.decode_s if self.steps and self.decode_s > 0 else 0.0


class Rows:
    """Collects the tokens of each row, tells of them, and takes the times."""

    def __init__(self, batch: int, end_ids: frozenset[int], on_tokens: OnTokens) -> None:
        # With the token that ended a row, as the model was given it.
        self.all_ids: list[list[int]] = [[] for _ in range(batch)]
        self.steps = 0
        # Whether any row's logits were no numbers.
        self.unsound = False
        self.ended = [False] * batch
        self._end_ids = end_ids
        self._on_tokens = on_tokens
        self._times: list[TokenTime] = []
        self._start = self._first = self._last = time.perf_counter()

    @property
    def all_ended(self) -> bool:
        """Whether there is nothing more to make."""
        return all(self.ended)

    def push(self, tokens: list[int]) -> None:
        """Take the next token of each row.

        Raises:
            NotFiniteError: there is none for a row that has not ended; nobody has been told of this step.
        """
        self._last = time.perf_counter()
        if NO_TOKEN in tokens:
            self._look_at_missing(tokens)
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

    def _look_at_missing(self, tokens: list[int]) -> None:
        """What is made of a row after its end is of no concern, but for what it leaves in the buffers."""
        self.unsound = True
        if rows := [row for row, token in enumerate(tokens) if token == NO_TOKEN and not self.ended[row]]:
            raise NotFiniteError(rows, self.steps)

    def generation(self, tier: str, reason: str, reused: int) -> Generation:
        ids = tuple(tuple(row[:-1] if row[-1] in self._end_ids else row) for row in self.all_ids)
        prefill, loop = self._first - self._start, self._last - self._first
        steps = sum(len(row) - 1 for row in self.all_ids)
        return Generation(ids, prefill, loop, steps, tier, reason, reused, self._times)
