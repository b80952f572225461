"""Boxes and points from the JSON in an answer, the picture with them drawn on it, and a mask of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..checks import whole_characters
from . import notations
from .nearly_json import can_mend, objects
from .notations import Named

# Units of an answer's numbers: found by a rule, thousandths of each side, or pixels of the picture as the model saw it.
COORDINATES = ("auto", "0-1000", "pixels")
THOUSAND = 1000
_OWN_KEY = re.compile(r"bbox_2d|point_2d")
# Characters, about a quarter of a million tokens: no model answers with more.
_LONGEST = 1_000_000
_MAX_LABEL = 60
_MOST_PROBLEMS = 20
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a5b5", "#f032e6", "#808000")


@dataclass(frozen=True, slots=True)
class Mark:
    """A box (left, top, right, bottom), or a point, which is held as a box without size."""

    box: tuple[float, float, float, float]
    label: str = ""
    is_point: bool = False


class Found(NamedTuple):
    """Marks that can be used, and a sentence for each mistake in the others."""

    marks: list[Mark]
    problems: list[str]


def read(text: str) -> Found:
    """Read every box and point in an answer, in the answer's own coordinates; name what is wrong with the rest.

    The answer may be JSON, or nearly JSON, in a code block or among words: one object or lists of them, with Qwen's
    keys or similar ones. It may also be Qwen2-VL's pairs, Qwen2.5-VL's tags, or four numbers alone, and be cut off.
    """
    longer = len(text) > _LONGEST
    text = whole_characters(text[:_LONGEST])
    marks, problems, cut_off = _read_objects(text)
    if not (marks or problems):
        marks = _marks(notations.of_text(text))
        cut_off = notations.is_cut_off(text) if marks else cut_off
    if not (marks or problems) and (marks := _marks(notations.without_key(text))):
        problems = ["lists of four numbers without a key were taken for boxes"]
    problems = _first(problems)
    if longer:
        problems.append(f"the answer has more than {_LONGEST:,} characters: the rest of it was not read")
    elif (marks or problems) and cut_off:
        problems.append("the list has no end: the answer was cut off, so there may be more (raise max_new_tokens)")
    once = list(dict.fromkeys(marks))
    if len(once) < len(marks):
        problems.append(f"{len(marks) - len(once)} objects are there more than once")
    return Found(once, problems)


def counts_pixels(marks: Sequence[Mark], seen: tuple[int, int], known: str = "") -> bool:
    """Tell by the rule of "auto" if an answer counts pixels: the family does, or a number above 1000 is in the picture.

    Args:
        seen: (width, height) of the picture as the model saw it.
        known: what the model's family counts, one of COORDINATES; "" if that is not known. A finetune may count
            otherwise, so a number above 1000 decides.
    """
    if known == "pixels":
        return True
    sides = [(value, side) for mark in marks for value, side in zip(mark.box, seen * 2, strict=True)]
    return any(THOUSAND < value <= side for value, side in sides)


def place(marks: Sequence[Mark], unit: tuple[float, float], size: tuple[int, int]) -> Found:
    """Convert marks to pixels of a picture, cut off at its edges; name those that are left out.

    Args:
        unit: the marks' own coordinates of the picture's right and lower edge, e.g. (1000, 1000).
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
    """Copy the picture as RGB and draw the marks and their labels on it, one colour per label."""
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
    """Draw a mask, mode L: white where a box is, and a small white disc for a point."""
    drawn = Image.new("L", size)
    pen = ImageDraw.Draw(drawn)
    for mark in marks:
        if mark.is_point:
            pen.ellipse(_disc(mark, size), fill=255)
        else:
            pen.rectangle(_pixels(mark), fill=255)
    return drawn


def as_bounding_boxes(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """Convert boxes to ComfyUI's bounding boxes, in pixels. Points are left out."""
    found = []
    for mark in marks:
        if not mark.is_point:
            left, top, right, bottom = _pixels(mark)
            found.append(
                {"x": left, "y": top, "width": right - left + 1, "height": bottom - top + 1, "label": mark.label}
            )
    return found


def _read_objects(text: str) -> tuple[list[Mark], list[str], bool]:
    """Return the marks in the text's objects, a sentence for each mistake, and if the text was cut off."""
    marks: list[Mark] = []
    problems: list[str] = []
    mended: list[str] = []
    left_out: list[str] = []
    found_objects, cut_off = objects(text, notations.WANTED)
    for piece in found_objects:
        found = list(notations.of_value(piece.value))
        here = _marks(named for named in found if isinstance(named, Named))
        # If a label holds the quotes it stands in, json-repair keeps the closing one too.
        marks += here if piece.exact else [replace(mark, label=mark.label.rstrip("'\"")) for mark in here]
        if piece.exact:
            problems += [problem for problem in found if isinstance(problem, str)]
        elif here:
            mended.append(piece.text)
        elif _OWN_KEY.search(piece.text):
            left_out.append(f"{_cut(piece.text)} is no JSON object, and left out")
    if left_out and not can_mend():
        left_out.insert(
            0, "json-repair, which mends what is no JSON object, is not installed (pip install json-repair)"
        )
    if mended:
        more = f", and {len(mended) - 1} more like it" if len(mended) > 1 else ""
        problems.insert(0, f"{_cut(mended[0])} is no JSON object, and was read as well as it can be{more}")
    return marks, [*problems, *left_out], cut_off


def _marks(found: Iterable[Named]) -> list[Mark]:
    """Order each box's corners: left before right, top before bottom."""
    marks = []
    for numbers, label in found:
        x, y = sorted(numbers[::2]), sorted(numbers[1::2])
        marks.append(Mark((x[0], y[0], x[-1], y[-1]), label, len(numbers) == 2))
    return marks


def _pixels(mark: Mark) -> tuple[int, int, int, int]:
    """Return the first column and row that the box touches, and the last ones, which belong to it."""
    # Rounded, because 500 thousandths of 192 come out as 96.00000000000001.
    left, top, right, bottom = (round(value, 6) for value in mark.box)
    return math.floor(left), math.floor(top), math.ceil(right) - 1, math.ceil(bottom) - 1


def _disc(mark: Mark, size: tuple[int, int]) -> tuple[float, float, float, float]:
    x, y = mark.box[:2]
    radius = max(3.0, min(size) / 60)
    return x - radius, y - radius, x + radius, y + radius


def _write(pen: ImageDraw.ImageDraw, mark: Mark, font: Any, color: str, size: tuple[int, int]) -> None:
    """Write the label on a plate above the mark, or below its upper edge if there is no room, inside the picture."""
    label = _cut(mark.label)
    left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0, min(mark.box[0], size[0] - width))
    y = mark.box[1] - height if mark.box[1] >= height else min(mark.box[1], max(0, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 3 - left, y + 3 - top), label, fill="white", font=font)


def _first(problems: list[str]) -> list[str]:
    """Keep the first problems, and count the others in one line."""
    more = len(problems) - _MOST_PROBLEMS
    return [*problems[:_MOST_PROBLEMS], f"and {more} more like these"] if more > 0 else problems


def _shown(mark: Mark) -> str:
    numbers = mark.box[:2] if mark.is_point else mark.box
    return f"{_cut(mark.label) or 'an object'} at {[round(number) for number in numbers]}"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 1]}…"
