"""What Qwen found in a picture: JSON in an answer -> boxes and points -> a picture with them, and a mask."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..checks import shown, whole_characters

# How an answer may count: by a rule, in thousandths of each side, or in pixels of the picture that the model saw.
COORDINATES = ("auto", "0-1000", "pixels")
THOUSAND = 1000
# Key -> how many numbers stand behind it.
_KEYS = {"bbox_2d": 4, "point_2d": 2}
_LABEL_KEYS = ("label", "text_content", "text", "name")
_MAX_LABEL = 60
_MOST_PROBLEMS = 20
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5b5", "#f032e6", "#808000")

# An object that is no JSON may hold others, so reading goes on within it; no character is read more often than this.
_MOST_READS = 8
_NUMBER = r"-?\d{1,9}(?:\.\d+)?"
# In an object that is no JSON: quotes of any kind or none, an end that is missing. What float() takes, and not so long
# that a text of quotes alone is read over and over.
_BROKEN_MARK = re.compile(rf"(bbox_2d|point_2d)[\"']?\s*:\s*\[\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*\]", re.ASCII)
_BROKEN_LABEL = re.compile(r"[\"']?label[\"']?\s*:\s*([\"'])(.{0,200}?)\1\s*[,}\n]")


@dataclass(frozen=True, slots=True)
class Mark:
    """A box as (left, top, right, bottom), or a point, which is written as a box without size."""

    box: tuple[float, float, float, float]
    label: str = ""
    is_point: bool = False


class Found(NamedTuple):
    """Marks, and a sentence for each thing that is wrong with the rest."""

    marks: list[Mark]
    problems: list[str]


def read(text: str) -> Found:
    """Every bbox_2d and point_2d in an answer, in its own coordinates, and what is wrong with the rest.

    The answer may be JSON, JSON in a code block or among words, one object or lists of them, and may be cut off.
    """
    text = whole_characters(text)
    marks: list[Mark] = []
    problems: list[str] = []
    open_lists = end = 0
    for start, after, value in _objects(text):
        open_lists += text.count("[", end, start) - text.count("]", end, start)
        end = after
        if value is None:
            _read_broken(text[start:after], marks, problems)
        else:
            _read_objects(value, marks, problems)
    open_lists += text.count("[", end) - text.count("]", end)
    problems = _first(problems)
    if marks and open_lists > 0:
        problems.append("the list has no end: the answer was cut off, so there may be more (raise max_new_tokens)")
    once = list(dict.fromkeys(marks))
    if len(once) < len(marks):
        problems.append(f"{len(marks) - len(once)} objects are there more than once")
    return Found(once, problems)


def counts_pixels(marks: Sequence[Mark], seen: tuple[int, int], known: str = "") -> bool:
    """The rule of "auto": pixels where the family counts them, or a number above 1000 lies within the picture.

    Args:
        seen: (width, height) of the picture as the model saw it.
        known: what the model's family counts, one of COORDINATES; "" where that is not known. Finetunes may count
            otherwise, so a number that cannot be a thousandth is believed.
    """
    if known == "pixels":
        return True
    sides = [(value, side) for mark in marks for value, side in zip(mark.box, seen * 2, strict=True)]
    return any(THOUSAND < value <= side for value, side in sides)


def place(marks: Sequence[Mark], unit: tuple[float, float], size: tuple[int, int]) -> Found:
    """Marks in pixels of a picture, cut off at its edges, and what is wrong with those that are left out.

    Args:
        unit: how far right and down the marks' own coordinates reach, e.g. (1000, 1000).
        size: (width, height) of the picture.
    """
    scale = [side / reach for side, reach in zip(size, unit, strict=True)] * 2
    placed, problems = [], []
    for mark in marks:
        left, top, right, bottom = (value * factor for value, factor in zip(mark.box, scale, strict=True))
        box = (max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1])))
        inside = box[0] <= box[2] and box[1] <= box[3]
        if inside and (mark.is_point or (box[0] < box[2] and box[1] < box[3])):
            placed.append(replace(mark, box=box))
        else:
            problems.append(f"{_shown(mark)} is outside the picture or has no size")
    return Found(placed, _first(problems))


def draw(picture: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """A copy of the picture with the marks and their labels on it, one colour per label."""
    drawn = picture.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    short = min(picture.size)
    font = ImageFont.load_default(max(10, round(short / 36)))
    labels = dict.fromkeys(mark.label for mark in marks)
    colors = {label: _COLORS[number % len(_COLORS)] for number, label in enumerate(labels)}
    for mark in marks:
        color = colors[mark.label]
        if mark.is_point:
            pen.ellipse(_disc(mark, picture.size), fill=color, outline="white")
        else:
            pen.rectangle(_pixels(mark), outline=color, width=max(2, round(short / 200)))
    # Labels last: a box must not cross one.
    for mark in marks:
        if mark.label:
            _write(pen, mark, font, colors[mark.label], picture.size)
    return drawn


def mask(size: tuple[int, int], marks: Sequence[Mark]) -> Image.Image:
    """White where a box is, and a small disc for a point; mode L."""
    drawn = Image.new("L", size)
    pen = ImageDraw.Draw(drawn)
    for mark in marks:
        if mark.is_point:
            pen.ellipse(_disc(mark, size), fill=255)
        else:
            pen.rectangle(_pixels(mark), fill=255)
    return drawn


def as_bounding_boxes(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """ComfyUI's bounding boxes, in pixels. Points are none."""
    found = []
    for mark in marks:
        if not mark.is_point:
            left, top, right, bottom = _pixels(mark)
            found.append(
                {"x": left, "y": top, "width": right - left + 1, "height": bottom - top + 1, "label": mark.label}
            )
    return found


class _Uncounted(str):
    """A text for json, which counts the lines from its beginning up to each mistake; nobody reads that number."""

    __slots__ = ()

    def count(self, *_: object) -> int:
        return 0

    def rfind(self, *_: object) -> int:
        return -1


def _objects(text: str) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """Start, end and value of each object. One that is no JSON has no value, and ends where the next one begins."""
    decoder, uncounted = json.JSONDecoder(), _Uncounted(text)
    mistakes: list[int] = []  # where those that were read in vain stopped
    end = 0
    while (start := text.find("{", end)) >= 0:
        mistakes = [each for each in mistakes if each > start]
        value = None
        if len(mistakes) < _MOST_READS:
            try:
                value, end = decoder.raw_decode(uncounted, start)
            except (ValueError, RecursionError) as error:  # too deep, or a number of thousands of digits, has no pos
                mistakes.append(getattr(error, "pos", len(text)))
        if value is None:
            after = text.find("{", start + 1)
            end = after if after >= 0 else len(text)
        yield start, end, value


def _read_objects(value: Any, marks: list[Mark], problems: list[str]) -> None:
    """Add what the value holds, at any depth, in order."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            _read_object(value, marks, problems)
            waiting += reversed(list(value.values()))
        elif isinstance(value, list):
            waiting += reversed(value)


def _read_object(value: dict[str, Any], marks: list[Mark], problems: list[str]) -> None:
    label = whole_characters(next((value[key] for key in _LABEL_KEYS if isinstance(value.get(key), str)), ""))
    for key, count in _KEYS.items():
        if key not in value:
            continue
        found = [box for numbers in _rows(value[key]) if (box := _box(numbers, count))]
        marks += [Mark(box, label, count == 2) for box in found]
        if not found:
            problems.append(f"{key} of {label!r} must be {count} numbers, got {_cut(shown(value[key]))}")


def _read_broken(text: str, marks: list[Mark], problems: list[str]) -> None:
    """The same from an object that is not JSON or has no end."""
    if not any(key in text for key in _KEYS):
        return
    label = _BROKEN_LABEL.search(text)
    name = label.group(2) if label else ""
    found = [
        Mark(box, name, key == "point_2d")
        for key, numbers in _BROKEN_MARK.findall(text)
        if (box := _box([float(number) for number in numbers.split(",")], _KEYS[key]))
    ]
    marks += found
    problems.append(f"{_cut(text)} is no JSON object, and {'was read as well as it can be' if found else 'left out'}")


def _rows(value: Any) -> Iterator[Any]:
    """A box or a list of boxes, as a list of boxes."""
    if isinstance(value, list):
        yield from value if value and isinstance(value[0], list) else [value]


def _box(numbers: Sequence[Any], count: int) -> tuple[float, float, float, float] | None:
    """Four or two numbers as a box whose left is left of its right; None for anything else."""
    if not isinstance(numbers, list) or len(numbers) != count:
        return None
    # Whoever writes numbers of a hundred digits has not found a box.
    if not all(isinstance(number, (int, float)) and abs(number) < 1e9 for number in numbers):
        return None
    x, y = (sorted(float(number) for number in numbers[axis::2]) for axis in (0, 1))
    return x[0], y[0], x[-1], y[-1]


def _pixels(mark: Mark) -> tuple[int, int, int, int]:
    """First and last column and row that the box touches, both included."""
    # Rounded, because 500 thousandths of 192 are 96.00000000000001.
    left, top, right, bottom = (round(value, 6) for value in mark.box)
    return math.floor(left), math.floor(top), math.ceil(right) - 1, math.ceil(bottom) - 1


def _disc(mark: Mark, size: tuple[int, int]) -> tuple[float, float, float, float]:
    x, y = mark.box[:2]
    radius = max(3.0, min(size) / 60)
    return x - radius, y - radius, x + radius, y + radius


def _write(pen: ImageDraw.ImageDraw, mark: Mark, font: Any, color: str, size: tuple[int, int]) -> None:
    """The label on a plate above the mark, or below its upper edge where there is no room, within the picture."""
    label = _cut(mark.label)
    left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0, min(mark.box[0], size[0] - width))
    y = mark.box[1] - height if mark.box[1] >= height else min(mark.box[1], max(0, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 3 - left, y + 3 - top), label, fill="white", font=font)


def _first(problems: list[str]) -> list[str]:
    """Of a mistake that is made over and over, nobody reads every line."""
    more = len(problems) - _MOST_PROBLEMS
    return [*problems[:_MOST_PROBLEMS], f"and {more} more like these"] if more > 0 else problems


def _shown(mark: Mark) -> str:
    numbers = mark.box[:2] if mark.is_point else mark.box
    return f"{_cut(mark.label) or 'an object'} at {[round(number) for number in numbers]}"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 1]}…"
