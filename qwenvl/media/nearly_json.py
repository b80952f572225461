"""Objects in a model's answer: JSON, nearly JSON, among words, cut off. Knows nothing of what they hold.

What is JSON is read as such. The rest is mended by json-repair, which is recursive and slow on nonsense: it is given
one small object at a time, and not many of them.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# An object that is no JSON may hold others, so reading goes on within it; no character is read more often than this.
_MOST_READS = 8
# What json-repair is given: characters and objects within one at a time, and characters of a whole answer.
_LONGEST, _MOST_WITHIN, MOST_MENDED = 2000, 4, 200_000
# No other object is JSON with something in it.
_BEGINNING = re.compile(r"\{(?=\s*\")")
_MARK = re.compile(r"[\[\]{}\"']")
# A quote opens a string after one of these, and closes it before one of those: others are apostrophes and inches.
_BEFORE_STRING = "[{,:("
_END = {quote: re.compile(rf"(?<!\\){quote}(?=\s{{0,9}}(?:[,:\]}})`]|\Z))") for quote in "\"'"}
# A bracket before a word is of a sentence.
_LIST = re.compile(r"\[\s{0,40}(?:[\[{(\"'“\d.+-]|\Z)")
_OPENS = {"}": "{", "]": "["}
# A number, or the string of one, at the very end: more digits may have been to come.
_LAST_NUMBER = re.compile(r"[\"']?[-+.\deE]{1,40}\Z")


class Piece(NamedTuple):
    """A part of an answer that begins like an object."""

    text: str
    # What it holds; None where nothing could be made of it.
    value: Any
    # Whether it was JSON as it stood.
    exact: bool


class Outline(NamedTuple):
    """The brackets of a text, as far as they can be told."""

    # Where a bracket that is closed begins -> where that ends.
    ends: dict[int, int]
    # Where the text stops in the middle of something: behind the last thing that is whole. None where it does not.
    cut_at: int | None


def objects(text: str, wanted: re.Pattern[str]) -> tuple[list[Piece], bool]:
    """The objects of a text that hold something, in order, and whether the text was cut off in the middle of one.

    Args:
        wanted: finds the keys that make an object worth reading.
    """
    keys = [found.start() for found in wanted.finditer(text)]
    exact = _exact(text, keys[-1]) if keys else {}
    outline = outline_of(text, {start: end for start, (end, _) in exact.items()})
    pieces = [Piece(text[start:end], value, True) for start, (end, value) in exact.items()]
    starts, spans = [*exact], [*_others(text, keys, exact, outline)]
    mended = 0
    for start, end in spans:
        mended += min(end - start, _LONGEST)
        value = _mend(_whole_part(text[start:end], start, outline)) if mended <= MOST_MENDED else None
        pieces.append(Piece(text[start:end], value, False))
        starts.append(start)
    ordered = [pieces[number] for number in sorted(range(len(starts)), key=starts.__getitem__)]
    return ordered, outline.cut_at is not None


def outline_of(text: str, known: Mapping[int, int]) -> Outline:
    """Which brackets belong together, and whether the text was cut off. Each character is looked at once.

    Args:
        known: where an object that is JSON begins -> where it ends. Those are passed over.
    """
    ends: dict[int, int] = {}
    open_ones: list[tuple[str, int]] = []
    counts = {"[": 0, "{": 0}
    place = last = 0
    while found := _MARK.search(text, place):
        mark, start, place = found.group(), found.start(), found.end()
        if start in known:
            place = known[start]
        elif mark in counts:
            open_ones.append((mark, start))
            counts[mark] += 1
        elif mark in _OPENS:
            _close(_OPENS[mark], place, open_ones, counts, ends)
        elif open_ones and _opens_string(text, start):
            closed = _END[mark].search(text, place)
            if closed is None:
                return Outline(ends, start)
            place = closed.end()
        last = place
    open_ones = [each for each in open_ones if each[0] == "{" or _LIST.match(text, each[1])]
    return Outline(ends, last if open_ones and not _goes_on(text, open_ones[-1], last) else None)


def _close(
    bracket: str, after: int, open_ones: list[tuple[str, int]], counts: dict[str, int], ends: dict[int, int]
) -> None:
    """End the last one of that kind, where there is one; whatever was forgotten in it ends with it."""
    opened = ""
    while counts[bracket] and opened != bracket:
        opened, start = open_ones.pop()
        counts[opened] -= 1
        ends[start] = after


def can_mend() -> bool:
    """Whether json-repair is installed: whoever updates by hand may lack it."""
    return _library() is not None


def _mend(text: str) -> Any:
    """What json-repair makes of a short text; None where that is nothing."""
    repair = _library()
    try:
        return repair(text, return_objects=True, skip_json_loads=True) if repair else None
    except (ValueError, RecursionError):
        return None


def _library() -> Callable[..., Any] | None:
    try:
        from json_repair import repair_json
    except ImportError:
        return None
    return repair_json


class _Uncounted(str):
    """A text for json, which counts the lines from its beginning up to each mistake; nobody reads that number."""

    __slots__ = ()

    def count(self, *_: object) -> int:
        return 0

    def rfind(self, *_: object) -> int:
        return -1


def _exact(text: str, last: int) -> dict[int, tuple[int, Any]]:
    """Where each object that is JSON begins -> where it ends, and its value; none that begins after the last key."""
    decoder, uncounted = json.JSONDecoder(), _Uncounted(text)
    exact: dict[int, tuple[int, Any]] = {}
    mistakes: list[int] = []  # where those that were read in vain stopped
    end = 0
    while (found := _BEGINNING.search(text, end, last)) is not None:
        start, end = found.start(), found.end()
        mistakes = [each for each in mistakes if each > start]
        if len(mistakes) < _MOST_READS:
            try:
                value, end = decoder.raw_decode(uncounted, start)
                exact[start] = (end, value)
            except (ValueError, RecursionError) as error:  # too deep, or a number of thousands of digits, has no pos
                mistakes.append(getattr(error, "pos", len(text)))
    return exact


def _others(
    text: str, keys: Sequence[int], exact: Mapping[int, tuple[int, Any]], outline: Outline
) -> Iterator[tuple[int, int]]:
    """Where each object that is no JSON and has a key begins and ends."""
    starts = [*exact]
    done = 0
    for key in keys:
        number = bisect_left(starts, key) - 1
        before = max(done, exact[starts[number]][0]) if number >= 0 else done
        if key < before:
            continue
        start = _around(text, key, before, outline)
        done = _end_of_one(text, start, key, keys, outline) if start >= 0 else key
        if start >= 0:
            yield start, done


def _around(text: str, key: int, first: int, outline: Outline) -> int:
    """Where the innermost object around a key begins, no earlier than first; -1 where there is none."""
    start = key
    for _ in range(_MOST_WITHIN):
        start = text.rfind("{", first, start)
        if start < 0 or outline.ends.get(start, len(text)) > key:
            return start
    return -1


def _end_of_one(text: str, start: int, key: int, keys: Sequence[int], outline: Outline) -> int:
    """Where an object that is no JSON ends: where one within it begins, if it is large or that one is wanted too."""
    end = outline.ends.get(start, len(text))
    within = text.find("{", key)
    first = within if within >= 0 else len(text)
    if end - start > _LONGEST:
        return min(first, end)
    for _ in range(_MOST_WITHIN):
        if not 0 <= within < end:
            return end
        if _any_between(keys, within, outline.ends.get(within, len(text))):
            return first
        within = text.find("{", within + 1)
    return first


def _whole_part(piece: str, start: int, outline: Outline) -> str:
    """As much as is mended, without an end that is half a word or half a number."""
    at = outline.cut_at
    cut = at is not None and start not in outline.ends and start < at <= start + len(piece)
    if cut and at is not None and piece[at - start :][:1] in ("'", '"'):
        return piece[: at - start][:_LONGEST]  # in the middle of a string
    return _LAST_NUMBER.sub("", piece[:_LONGEST]) if cut or len(piece) > _LONGEST else piece


def _any_between(places: Sequence[int], start: int, end: int) -> bool:
    first = bisect_left(places, start)
    return first < len(places) and places[first] < end


def _opens_string(text: str, place: int) -> bool:
    before = text[max(0, place - 40) : place].rstrip()
    return before[-1:] in _BEFORE_STRING and before != ""


def _goes_on(text: str, innermost: tuple[str, int], last: int) -> bool:
    """Whether words or the end of a code block follow what has no end: then it was not cut off there."""
    mark, start = innermost
    return "```" in text[start:] or (mark == "[" and re.search(r"[^\W\d_]", text[last:]) is not None)
