"""Several questions at a time: how many fit, reading the next pictures meanwhile, and prompts -> answers."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from . import media
from .answer import Writer
from .faults import unless_out_of_memory
from .keyvalues import capacity_for
from .loader import ModelHandle
from .log import log
from .prefill import Check
from .prompt import Prompt, side_by_side
from .request import Answer, Sampling
from .rows import Generation
from .settings import MAX_SEED

# More rows than this gain little, and each has to wait for the longest answer of all.
MOST_ROWS = 16
# What is left of the memory that is free: others need some, and estimates err.
USED_SHARE = 0.8
READERS = 2

Look = Callable[[Sequence[Writer]], None]


class Room:
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

    def holds(self, prompts: Sequence[Prompt]) -> bool:
        """Whether these fit; a single one always does, for it is to be tried."""
        tokens = max(prompt.tokens for prompt in prompts)
        # Half as much again: a buffer that grows is copied.
        row = self._bytes_of(capacity_for(tokens + self._longest) * 3 // 2, tokens)
        return len(prompts) == 1 or (len(prompts) <= self.most and len(prompts) * row <= self._free)

    def halve(self, tried: int) -> None:
        """So many did not fit."""
        self.most = max(1, tried // 2)
        log.warning("%d answers at a time need too much memory: going on with %d", tried, self.most)


def read_ahead(items: Iterable[tuple[str, Any]], depth: int) -> Generator[tuple[int, list[Any] | Exception]]:
    """(index, its pictures or why it cannot be read) of each item in order; the next `depth` are read meanwhile."""
    waiting: deque[tuple[int, Future[list[Any]]]] = deque()
    readers = ThreadPoolExecutor(READERS, "qwenvl-read")
    try:
        for index, (name, item) in enumerate(items):
            waiting.append((index, readers.submit(_read, name, item)))
            if len(waiting) > depth:
                yield _outcome(*waiting.popleft())
        while waiting:
            yield _outcome(*waiting.popleft())
    finally:
        readers.shutdown(cancel_futures=True)


def _read(name: str, item: Any) -> list[Any]:
    return media.pictures({name: item() if callable(item) else item})


def _outcome(index: int, future: Future[list[Any]]) -> tuple[int, list[Any] | Exception]:
    try:
        return index, future.result()
    except (media.MediaError, OSError) as error:
        return index, error


class Batches:
    """Answers questions with one model, as many at a time as there is room for.

    Args:
        model: with its decoder.
        seed: of the run; None where sampling is greedy.
        room: how many fit.
        out_of_memory: called where not even one answer fitted, with whether it was tried again; makes room, or raises.
    """

    def __init__(
        self,
        model: ModelHandle,
        sampling: Sampling,
        seed: int | None,
        room: Room,
        out_of_memory: Callable[[bool], None],
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._seed = seed
        self._room = room
        self._out_of_memory = out_of_memory
        self.made: list[Generation] = []
        self._counts = {"answers": 0, "batch_size": 0, "prompt_tokens": 0, "new_tokens": 0, "thoughts_cut": 0}
        self._began = time.perf_counter()
        # From the start of the first batch to its first token.
        self.first_token_s = 0.0

    def answers(
        self, prompts: Iterable[tuple[int, Prompt]], look: Look, check: Check
    ) -> Iterator[list[tuple[int, Answer | None]]]:
        """Batch by batch, the number of each prompt and its answer: None where the model only thought.

        Args:
            look: called after every token.
            check: called often while there is no token yet.
        """
        try:
            for batch in self._in_batches(prompts):
                yield from self._smaller_and_smaller(batch, look, check)
        finally:
            if self._counts["batch_size"] > 1:
                # Made for many rows, they are too large to keep.
                self._model.decoder.drop_buffers()

    def figures(self) -> dict[str, Any]:
        """What Stats says of the generation."""
        decode_s, steps = sum(each.decode_s for each in self.made), sum(each.steps for each in self.made)
        return {
            **self._counts,
            "prefill_s": sum(each.prefill_s for each in self.made),
            "decode_tokens_per_s": steps / decode_s if steps and decode_s > 0 else 0.0,
            "reused_tokens": self.made[0].reused_tokens,
            "tier": self.made[0].tier,
            "tier_reason": self.made[0].tier_reason,
        }

    def _in_batches(self, prompts: Iterable[tuple[int, Prompt]]) -> Iterator[list[tuple[int, Prompt]]]:
        """Neighbours together, as many as there is room for."""
        batch: list[tuple[int, Prompt]] = []
        for each in prompts:
            if batch and not self._room.holds([prompt for _, prompt in (*batch, each)]):
                yield batch
                batch = []
            batch.append(each)
            if len(batch) >= self._room.most:
                yield batch
                batch = []
        if batch:
            yield batch

    def _smaller_and_smaller(
        self, batch: list[tuple[int, Prompt]], look: Look, check: Check
    ) -> Iterator[list[tuple[int, Answer | None]]]:
        """One batch, in parts where memory runs out; what is finished stays finished."""
        again = False
        while batch:
            part = batch[: self._room.most]
            answers = self._try([prompt for _, prompt in part], part[0][0], look, check)
            if answers is not None:
                yield [(index, answer) for (index, _), answer in zip(part, answers, strict=True)]
                batch, again = batch[len(part) :], False
            elif len(part) > 1:
                self._room.halve(len(part))
            else:
                self._out_of_memory(again)
                again = True

    def _try(self, prompts: list[Prompt], number: int, look: Look, check: Check) -> list[Answer | None] | None:
        """None where memory ran out, with everything that was made for the prompts given back."""
        write = partial(self._write, prompts, later_seed(self._seed, number), look, check)
        answers = unless_out_of_memory(write)
        if answers is None:
            self._model.decoder.drop_buffers()
        return answers

    def _write(self, prompts: list[Prompt], seed: int | None, look: Look, check: Check) -> list[Answer | None]:
        sampling, started = self._sampling, time.perf_counter()
        writers = [Writer(self._model.tokenizer, prompt.thinks, sampling) for prompt in prompts]
        listener = _Listener(writers, writers, look)
        made = [self._go_on(prompts, replace(sampling, max_new_tokens=sampling.longest), seed, listener, check)]
        cut = [row for row, writer in enumerate(writers) if writer.over_budget]
        if cut:
            # A single row finds its prompt and its thought in memory still.
            longer = [prompts[row].continued([*made[0].rows[row], *writers[row].close_thought()]) for row in cut]
            how = replace(sampling, min_new_tokens=max(0, sampling.min_new_tokens - sampling.thinking_budget))
            listener = _Listener([writers[row] for row in cut], writers, look)
            made.append(self._go_on(longer, how, later_seed(seed, 1), listener, check))
        if not self.made:
            self.first_token_s = started - self._began + made[0].prefill_s
        self.made += made
        self._count(prompts, writers, len(cut))
        return [writer.end() for writer in writers]

    def _go_on(
        self, prompts: Sequence[Prompt], how: Sampling, seed: int | None, listener: _Listener, check: Check
    ) -> Generation:
        name = prompts[0].media if len(prompts) == 1 else ""
        return self._model.decoder.generate(side_by_side(prompts), how, seed, listener, check, name)

    def _count(self, prompts: Sequence[Prompt], writers: Sequence[Writer], cut: int) -> None:
        counts = self._counts
        counts["answers"] += len(prompts)
        counts["batch_size"] = max(counts["batch_size"], len(prompts))
        counts["prompt_tokens"] += sum(prompt.tokens for prompt in prompts)
        counts["new_tokens"] += sum(writer.tokens for writer in writers)
        counts["thoughts_cut"] += cut


class _Listener:
    """Gives each row's tokens to its writer. No function within a method: its frame in the traceback of a cancel would
    hold the model by what it closes over."""

    def __init__(self, rows: Sequence[Writer], everyone: Sequence[Writer], look: Look) -> None:
        self._rows = rows
        self._everyone = everyone
        self._look = look

    def __call__(self, new: Sequence[Sequence[int]]) -> list[int]:
        enough = [row for row, (writer, ids) in enumerate(zip(self._rows, new, strict=True)) if writer.push(ids)]
        self._look(self._everyone)
        return enough


def run_seed(sampling: Sampling) -> int | None:
    """The seed of a run, a new one where -1 asks for it; None where it would have no effect."""
    if sampling.greedy:
        return None
    return secrets.randbits(53) if sampling.seed == -1 else sampling.seed


def later_seed(seed: int | None, step: int) -> int | None:
    """Another seed for another part of the same run, so that it does not draw the same numbers."""
    return None if seed is None else (seed + step) % (MAX_SEED + 1)
