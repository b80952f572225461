"""Reads boxes and points in the ways that models write them: keys of JSON objects, and notations other than JSON.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..checks import shown, whole_characters


class Named(NamedTuple):
    """The four numbers of a box or the two of a point, as they were written, and its label."""

    numbers: tuple[float, ...]
    label: str


# Qwen's own keys: a value that is not a box or a point is a mistake. The other keys come from people's prompts and may
# mean anything. _KEYS: how many numbers stand behind a key -> the keys.
_OWN = ("bbox_2d", "point_2d")
_KEYS = {
    4: ("bbox_2d", "bbox", "bboxes", "box_2d", "box", "boxes", "bbox2d", "box2d", "bounding_box", "bounding_boxes",
        "boundingbox", "bndbox", "rect", "coordinates", "coords", "location", "position"),
    2: ("point_2d", "point", "points", "points_2d", "point2d", "coordinate", "coordinates", "coords", "location",
        "position"),
}  # fmt: skip
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
_FIRST_CORNERS = {keys[0] for keys in _CORNERS} | {"x"}
_SIZES = (("x", "y", "width", "height"), ("x", "y", "w", "h"))
_COUNTS = {key: [count for count, keys in _KEYS.items() if key in keys] for keys in _KEYS.values() for key in keys}
_COUNTS_ORDER = {key: number for number, key in enumerate(key for keys in _KEYS.values() for key in keys)}
_COUNTS_ORDER |= dict.fromkeys(_OWN, -1)
# If an object has several of these, the first counts.
_LABELS = (
    "label", "text_content", "text", "name", "name_en", "name_zh", "names", "labels", "class", "class_name", "category",
    "object", "object_name", "description", "caption", "title", "tag", "alt", "content",
)  # fmt: skip
_LABEL_KEYS = {key: number for number, key in enumerate(_LABELS)}
# Keys that make an object worth mending, with or without quotes.
_ALL_KEYS = "|".join(sorted({key.replace("_", "[_ ]") for keys in _KEYS.values() for key in keys}, reverse=True))
WANTED = re.compile(rf"\b(?:{_ALL_KEYS}|x1|xmin|x_min|left|x)\b[\"'”]?\s{{0,9}}[:=]", re.IGNORECASE)

_NUMBER = r"[-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})"
_ONE_NUMBER = re.compile(rf"\s*({_NUMBER})\s*\Z")
_NUMBERS = re.compile(_NUMBER)
# A text that holds nothing but numbers.
_ONLY_NUMBERS = re.compile(r"[\s\d\[\](){}<>,;.+-]{3,200}")
_TOKEN = re.compile(r"<\|[a-z_]{1,40}\|>|</?(?:ref|box|quad)>")
_PAIR = rf"[(\[]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[)\]]"
# Qwen2-VL: the dog(10,20),(300,400), once the special tokens are taken out.
_TWO_CORNERS = re.compile(rf"{_PAIR}\s{{0,9}}[,;-]?\s{{0,9}}{_PAIR}")
# A point with nothing but its name in the same line.
_LINE_OF_A_POINT = re.compile(rf"^([^\n()\[\]{{}}<>\d]{{0,60}}){_PAIR}[\s.,;]{{0,9}}$", re.MULTILINE)
# Qwen2.5-VL: <points x1="1" y1="2" x2="3" y2="4" alt="cups">cups</points>; in documents <p data-bbox="1 2 3 4">.
_TAG = re.compile(r"<(points?|bbox|box|rect)\b([^<>]{1,4000})>([^<]{0,200})", re.IGNORECASE)
_ATTRIBUTE = re.compile(rf"\b([xy])(\d{{0,4}})\s{{0,9}}=\s{{0,9}}[\"']?\s{{0,9}}({_NUMBER})")
_ALT = re.compile(r"\b(?:alt|label)\s{0,9}=\s{0,9}([\"'])(.{0,200}?)\1")
_DATA_BBOX = re.compile(r"<\w{1,20}\b[^<>]{0,400}\bdata-bbox=[\"']([^\"'<>]{1,100})[\"'][^<>]{0,400}>([^<]{0,200})")
# Four numbers in a list or a line, without a key: they count as a box only if nothing else is found.
_LIST_OF_FOUR = re.compile(
    rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]"
    rf"|^[ \t]*({_NUMBER})[ \t,]+({_NUMBER})[ \t,]+({_NUMBER})[ \t,]+({_NUMBER})[ \t]*$",
    re.MULTILINE,
)
_CUT_TAG = re.compile(
    r"\(\s*(?:[-+.\d][^()]{0,40})?\Z|\d\),\s*\Z|<(?:points?|bbox|box|\w{1,20}\s[^<>]{0,400}data-bbox)\b[^<>]{0,4000}\Z"
)
_MOST_BEFORE = 200


def of_value(value: Any) -> Iterator[Named | str]:
    """Yield the boxes and points of a JSON value, at any depth, in order; a sentence for each Qwen key without one."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            read: set[str] = set()
            yield from _of_object(value, read)
            waiting += [held for key, held in reversed(value.items()) if key not in read]
        elif isinstance(value, list):
            waiting += reversed(value)


def of_text(text: str) -> Iterator[Named]:
    """Yield boxes and points in notations other than JSON: Qwen2-VL's pairs, Qwen2.5-VL's tags."""
    text = _TOKEN.sub("", text)
    for tag in _TAG.finditer(text):
        yield from _of_tag(tag)
    for found in _DATA_BBOX.finditer(text):
        numbers = _floats(_NUMBERS.findall(found[1]))
        if len(numbers) == 4:
            yield Named(numbers, found[2].strip())
    yield from _after_their_names(text, _TWO_CORNERS)
    if not _TWO_CORNERS.search(text):
        for found in _LINE_OF_A_POINT.finditer(text):
            yield Named(_floats(found.groups()[1:]), _name(found[1]))


def without_key(text: str) -> list[Named]:
    """Find lists and lines of four numbers that can be a box, each with the name before it."""
    found = list(_after_their_names(text, _LIST_OF_FOUR))
    return [box for box in found if box.numbers[0] < box.numbers[2] and box.numbers[1] < box.numbers[3]]


def is_cut_off(text: str) -> bool:
    """Tell if a text of notations other than JSON ends in the middle of one."""
    return _CUT_TAG.search(text, max(0, len(text) - 5000)) is not None


def _of_object(value: dict[str, Any], read: set[str]) -> Iterator[Named | str]:
    """Yield what an object's own keys hold, and add the keys that were used to `read`."""
    names = {plain: key for key in value if (plain := _plain(key))}
    holders = [name for name in names if name in _COUNTS]
    found = 0
    for count in (4, 2) if holders else ():
        there = sorted((name for name in holders if count in _COUNTS[name]), key=_COUNTS_ORDER.__getitem__)
        for key in (names[name] for name in there):
            if boxes := boxes_in(value[key], count):
                read.add(key)
                found += len(boxes)
                yield from map(Named, boxes, _labels(value, names, len(boxes)))
                break
        else:
            if there and there[0] in _OWN:
                label = _labels(value, names, 1)[0]
                yield f"{there[0]} of {label!r} must be {count} numbers, got {_cut(shown(value[names[there[0]]]))}"
    if not found and (box := _of_corners(value)):
        yield Named(box, _labels(value, names, 1)[0])


@lru_cache(4096)
def _plain(key: str) -> str:
    """Write a key as the tables have it; "" if it is in none of them."""
    plain = re.sub(r"[\s-]+", "_", key.strip().lower()) if len(key) < 40 else ""
    return plain if plain in _COUNTS or plain in _LABEL_KEYS else ""


def boxes_in(value: Any, count: int) -> list[tuple[float, ...]]:
    """Return a value's boxes (count 4) or points (count 2), written as numbers, text, corners, or lists of these."""
    if isinstance(value, str):
        return _in_string(value, count)
    if isinstance(value, dict):
        box = _of_corners(value)
        return [box] if box and len(box) == count else []
    if not isinstance(value, list) or not value:
        return []
    numbers = [_number(item) for item in value]
    if None not in numbers:
        return [tuple(number for number in numbers if number is not None)] if len(numbers) == count else []
    if count == 4 and len(value) == 2:
        corners = [boxes_in(corner, 2) if isinstance(corner, list) else [] for corner in value]
        if all(len(corner) == 1 for corner in corners):
            return [corners[0][0] + corners[1][0]]
    # One level only: lists that are nested deeper are not boxes.
    return [box for item in value if not _is_nested(item) for box in boxes_in(item, count)]


def label_of(value: Any) -> str:
    """Make a label of a text, a number, a list of texts, or names by language (English first: it is drawn best)."""
    if isinstance(value, dict):
        return label_of(value.get("en")) or next((name for name in value.values() if isinstance(name, str)), "")
    if isinstance(value, list):
        return ", ".join(text for text in value if isinstance(text, str))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return shown(value)
    return whole_characters(value).strip() if isinstance(value, str) else ""


def _labels(value: dict[str, Any], names: dict[str, str], count: int) -> list[str]:
    """Return a label for each of the `count` boxes of an object."""
    several = value.get(names.get("label", ""))
    if isinstance(several, list) and len(several) == count and all(isinstance(label, str) for label in several):
        return [whole_characters(label) for label in several]
    known = sorted((name for name in names if name in _LABEL_KEYS), key=_LABEL_KEYS.__getitem__)
    return [next((label for name in known if (label := label_of(value[names[name]]))), "")] * count


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value)


def _in_string(text: str, count: int) -> list[tuple[float, ...]]:
    if not _ONLY_NUMBERS.fullmatch(text):
        return []
    numbers = _floats(_NUMBERS.findall(text))
    return [numbers] if len(numbers) == count else []


def _of_corners(value: dict[str, Any]) -> tuple[float, ...]:
    """Return the numbers of a box or point that has a key for each number; () if there is no such box."""
    held = {key.lower(): number for key, number in value.items() if len(key) < 10}
    if held.keys().isdisjoint(_FIRST_CORNERS):
        return ()
    named = {key: number for key, item in held.items() if (number := _number(item)) is not None}
    for keys in _CORNERS:
        if named.keys() >= set(keys):
            return tuple(named[key] for key in keys)
    for x, y, width, height in _SIZES:
        if named.keys() >= {x, y, width, height}:
            return named[x], named[y], named[x] + named[width], named[y] + named[height]
    return (named["x"], named["y"]) if named.keys() >= {"x", "y"} else ()


def _number(value: Any) -> float | None:
    """Read a number, or a string of one; None for anything else."""
    if isinstance(value, str):
        found = _ONE_NUMBER.match(value) if len(value) < 40 else None
        return float(found[1]) if found else None
    # Larger numbers are not coordinates.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e9 else None


def _of_tag(tag: re.Match[str]) -> Iterator[Named]:
    kind, attributes, inner = tag.groups()
    alt = _ALT.search(attributes)
    label = inner.strip() or (alt[2] if alt else "")
    numbers = {axis + number: float(value) for axis, number, value in _ATTRIBUTE.findall(attributes)}
    if kind.lower() not in ("point", "points"):
        if numbers.keys() >= {"x1", "y1", "x2", "y2"}:
            yield Named(tuple(numbers[key] for key in ("x1", "y1", "x2", "y2")), label)
        return
    for key, x in numbers.items():
        if key[0] == "x" and f"y{key[1:]}" in numbers:
            yield Named((x, numbers[f"y{key[1:]}"]), label)


def _after_their_names(text: str, pattern: re.Pattern[str]) -> Iterator[Named]:
    """Yield what a pattern finds, with the name before it, or the previous name if it has none."""
    label, end = "", 0
    for found in pattern.finditer(text):
        label = _name(text[max(end, found.start() - _MOST_BEFORE) : found.start()]) or label
        end = found.end()
        yield Named(_floats([number for number in found.groups() if number is not None]), label)


def _name(before: str) -> str:
    """Return the last words before a box, without the marks and words that join them to it."""
    last = re.split(r"[\n.;!?,{}\[\]()<>]", before.rstrip(" \t:,;=-([{\"'*`"))[-1]
    last = last.strip(" \t:,;=-\"'*`")
    return re.sub(r"^(?:and|und|et|和|、)\s+|(?<!\s)\s+(?:is|are|at|in)$", "", last)


def _floats(numbers: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(number) for number in numbers)


def _cut(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
