"""Finds the objects in a model's answer, which may be JSON or nearly JSON, stand among words, or be cut off.

Valid JSON is read as such. json-repair mends the rest. It is recursive, and slow on nonsense, so it gets one small
object at a time, and a limited number of them. What the objects mean is not known here.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# An object that is not JSON may hold others, so reading goes on inside it, but no character is read more often.
_MOST_READS = 8
# Limits for json-repair: characters of an object, objects inside it, and characters of a whole answer.
_LONGEST, _MOST_WITHIN, MOST_MENDED = 2000, 4, 200_000
# The beginning of every JSON object that is not empty.
_BEGINNING = re.compile(r"\{(?=\s*\")")
_MARK = re.compile(r"[\[\]{}\"']")
# A quote opens a string after one of these characters and closes it before an _END; others are apostrophes and inches.
_BEFORE_STRING = "[{,:("
_END = {quote: re.compile(rf"(?<!\\){quote}(?=\s{{0,9}}(?:[,:\]}})`]|\Z))") for quote in "\"'"}
# A bracket that begins a list. One before a word is part of a sentence.
_LIST = re.compile(r"\[\s{0,40}(?:[\[{(\"'“\d.+-]|\Z)")
_OPENS = {"}": "{", "]": "["}
# A number, or a string of one, at the very end: its last digits may be missing.
_LAST_NUMBER = re.compile(r"[\"']?[-+.\deE]{1,40}\Z")


class Piece(NamedTuple):
    """A part of an answer that begins like an object."""

    text: str
    # What it holds; None if it could not be read.
    value: Any
    # True if it was valid JSON as it stood.
    exact: bool


class Outline(NamedTuple):
    """The brackets of a text, as far as they can be matched."""

    # Where a closed bracket begins -> where it ends.
    ends: dict[int, int]
    # Where the last complete thing ends, if the text stops in the middle of something; else None.
    cut_at: int | None


def objects(text: str, wanted: re.Pattern[str]) -> tuple[list[Piece], bool]:
    """Return the text's objects that are not empty, in order, and if the text was cut off in the middle of one.

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
    """Match the brackets, and find where the text was cut off. Each character is looked at once.

    Args:
        known: where an object of valid JSON begins -> where it ends. These objects are passed over.
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
    open_ones = [(mark, start) for mark, start in open_ones if mark == "{" or _LIST.match(text, start)]
    return Outline(ends, last if open_ones and not _goes_on(text, open_ones[-1], last) else None)


def _close(
    bracket: str, after: int, open_ones: list[tuple[str, int]], counts: dict[str, int], ends: dict[int, int]
) -> None:
    """Close the last open bracket of that kind, if any, and every bracket inside it that was left open."""
    opened = ""
    while counts[bracket] and opened != bracket:
        opened, start = open_ones.pop()
        counts[opened] -= 1
        ends[start] = after


def can_mend() -> bool:
    """Tell if json-repair is installed. It may be missing after an update by hand."""
    return _library() is not None


def _mend(text: str) -> Any:
    """Read a short text with json-repair; None if that fails."""
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
    """A text in which json counts no lines: it would count them up to each mistake, for a number that is not used."""

    __slots__ = ()

    def count(self, *_: object) -> int:
        return 0

    def rfind(self, *_: object) -> int:
        return -1


def _exact(text: str, last: int) -> dict[int, tuple[int, Any]]:
    """Read the objects of valid JSON that begin before the last key: {where it begins: (where it ends, value)}."""
    decoder, uncounted = json.JSONDecoder(), _Uncounted(text)
    exact: dict[int, tuple[int, Any]] = {}
    mistakes: list[int] = []  # where reading an object failed
    end = 0
    while (found := _BEGINNING.search(text, end, last)) is not None:
        start, end = found.start(), found.end()
        mistakes = [mistake for mistake in mistakes if mistake > start]
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
    """Find where each object that has a key but is not valid JSON begins and ends."""
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
    """Find where the innermost object around a key begins, not before `first`; -1 if no object is around it."""
    start = key
    for _ in range(_MOST_WITHIN):
        start = text.rfind("{", first, start)
        if start < 0 or outline.ends.get(start, len(text)) > key:
            return start
    return -1


def _end_of_one(text: str, start: int, key: int, keys: Sequence[int], outline: Outline) -> int:
    """Find where an object that is not JSON ends: where one inside it begins, if it is large or that one has a key."""
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
    """Return the part of a piece to mend, without half a word or half a number at its end."""
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
    """Tell if words or the end of a code block follow an open bracket: then the text was not cut off there."""
    mark, start = innermost
    return "```" in text[start:] or (mark == "[" and re.search(r"[^\W\d_]", text[last:]) is not None)
