"""The node QwenVL Boxes: takes an answer and its picture; returns the picture with boxes, a mask, and the boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checks import checked, one_of, text_of
from ..comfyui.progress import NodeWatch
from ..files.bounded_json import SETTINGS, parse
from ..loading.loader import PICTURE_PIXELS
from ..log import log
from ..media import boxes, media
from ..settings import RESOLUTIONS
from .lists import first


class BoxesError(ValueError):
    """The number of answers does not fit the number of pictures."""


class QwenVLBoxes:
    """The node that draws boxes.

    INPUT_IS_LIST, because a batch comes with a text for each of its pictures, which ComfyUI itself would not pair.
    """

    DESCRIPTION = (
        "Draw the boxes and points that a Qwen model found. Ask the QwenVL node to locate something and to answer in "
        "JSON (preset: find objects as JSON), and connect its text and the same image here."
    )
    CATEGORY = "QwenVL"
    FUNCTION = "mark"
    INPUT_IS_LIST = True
    RETURN_TYPES = ("IMAGE", "MASK", "BOUNDING_BOX")
    RETURN_NAMES = ("image", "mask", "boxes")
    OUTPUT_IS_LIST = (True, True, True)
    OUTPUT_TOOLTIPS = (
        "The picture with boxes, points and labels.",
        "White where a box is, and a small disc for each point.",
        "x, y, width, height and label of each box in pixels: a list for each picture. Points are not among them.",
    )
    SEARCH_ALIASES = ("bounding box", "bbox", "detection", "grounding", "locate", "draw boxes", "vlm", "mask")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The picture that the answer is about, a batch, or a list."}),
                "text": (
                    "STRING",
                    {
                        "forceInput": True,
                        "tooltip": "The answer: bbox_2d or point_2d in JSON. One for each picture, or one for all.",
                    },
                ),
                "coordinates": (
                    list(boxes.COORDINATES),
                    {
                        "default": boxes.COORDINATES[0],
                        "tooltip": "What the answer's numbers count. 0-1000: thousandths of each side, as Qwen3-VL "
                        "and Qwen2-VL answer. pixels: those of the picture as it was scaled for the model, as "
                        "Qwen2.5-VL answers. auto: pixels where stats name a Qwen2.5-VL model, or where a number "
                        "above 1000 lies within the picture; else 0-1000. Pixels below 1000 look like thousandths, "
                        "so connect stats for Qwen2.5-VL, and choose pixels for its finetunes.",
                    },
                ),
            },
            "optional": {
                "stats": (
                    "STRING",
                    {"forceInput": True, "tooltip": "The QwenVL node's stats: they tell auto which model answered."},
                ),
                "image_resolution": (
                    list(RESOLUTIONS),
                    {
                        "default": next(iter(RESOLUTIONS)),
                        "tooltip": "As in the QwenVL node. Needed only without stats, where the answer counts pixels: "
                        "those of the picture after it was scaled.",
                    },
                ),
            },
        }

    def mark(
        self,
        image: list[torch.Tensor],
        text: list[str],
        coordinates: list[str],
        stats: Sequence[str] = (),
        image_resolution: Sequence[str] = tuple(RESOLUTIONS),
    ) -> dict[str, Any]:
        image = checked({"image": ("IMAGE", {})}, {"image": image})["image"]
        text = [text_of("text", answer) for answer in text]
        one_of("coordinates", first(coordinates), boxes.COORDINATES)
        one_of("image_resolution", first(image_resolution), tuple(RESOLUTIONS))
        batches = [media.pictures({"image": batch}) for batch in image]
        count = sum(len(batch) for batch in batches)
        if len(text) not in (1, count):
            raise BoxesError(
                f"There are {len(text)} texts for {count} pictures. Connect the image that the QwenVL node was asked "
                "about; with several pictures set its image_mode to 'one answer per image'."
            )
        runs = [run for text_of_stats in stats if (run := _read(text_of_stats))]
        known = coordinates_of(runs[0]) if runs else ""
        how = _Counting(coordinates[0], known, RESOLUTIONS[image_resolution[0]] or PICTURE_PIXELS)
        asked = zip(text if len(text) == count else text * count, _sizes(runs, count), strict=True)
        marked = [[(picture, *_found(picture, *next(asked), how)) for picture in batch] for batch in batches]
        lines = [line for batch in marked for _, _, line in batch]
        NodeWatch(1).end("\n".join(lines))
        return {
            "ui": {"text": lines},
            "result": (
                [_tensor(boxes.draw(picture, marks) for picture, marks, _ in batch) for batch in marked],
                [_tensor(boxes.mask(picture.size, marks) for picture, marks, _ in batch) for batch in marked],
                [[boxes.as_bounding_boxes(marks) for _, marks, _ in batch] for batch in marked],
            ),
        }


@dataclass(frozen=True, slots=True)
class _Counting:
    """The unit of an answer's numbers, and how to find it out."""

    # The widget's value, and the unit of the model's family according to the stats, "" if they do not say.
    coordinates: str
    known: str
    # The least and most pixels that pictures were scaled to, used if the stats do not say.
    pixels: tuple[int, int]

    def unit(self, marks: Sequence[boxes.Mark], size: tuple[int, int], seen: tuple[int, int] | None) -> tuple[int, int]:
        """Return the (x, y) that stands for the picture's right and lower edge in the answer.

        Args:
            size: (width, height) of the picture in pixels.
            seen: (width, height) as the model saw it; None if the stats do not say.
        """
        thousand = (boxes.THOUSAND, boxes.THOUSAND)
        if self.coordinates == "0-1000" or not marks:
            return thousand
        seen = seen or self._seen(*size)
        return seen if self.coordinates == "pixels" or boxes.counts_pixels(marks, seen, self.known) else thousand

    def _seen(self, width: int, height: int) -> tuple[int, int]:
        """Compute (width, height) of the picture as Qwen2.5-VL's processor scales it."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        low, high = self.pixels
        height, width = smart_resize(height, width, min_pixels=low, max_pixels=high)
        return width, height


def _found(
    picture: Image.Image, answer: str, seen: tuple[int, int] | None, how: _Counting
) -> tuple[list[boxes.Mark], str]:
    """Read the answer's boxes and points, place them in the picture's pixels, and describe them in a line."""
    marks, problems = boxes.read(answer)
    placed, outside = boxes.place(marks, how.unit(marks, picture.size, seen), picture.size)
    if not marks:
        outside = ["there is no bbox_2d or point_2d in the answer"]
    for problem in [*problems, *outside]:
        log.warning("boxes: %s", problem)
    labels = ", ".join(mark.label for mark in placed if mark.label)
    found = f"{len(placed)} found: {labels}" if labels else f"{len(placed)} found"
    return placed, "; ".join([found, *problems, *outside])


def coordinates_of(stats: Mapping[str, Any]) -> str:
    """Read the unit of the model's family from the stats: "pixels", "0-1000", or "" if they do not say."""
    found = stats.get("coordinates")
    return found if found in boxes.COORDINATES[1:] else ""


def seen_sizes_of(stats: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Read (width, height) of each picture as the model saw it from the stats, in order; [] if they do not say."""
    answers = stats.get("seen_sizes")
    if not isinstance(answers, list):
        return []
    # The sizes are listed by answer, each about one picture or several.
    sizes = [_size(value) for answer in answers for value in (answer if isinstance(answer, list) else [answer])]
    known = [size for size in sizes if size]
    return known if len(known) == len(sizes) else []


def _size(value: object) -> tuple[int, int] | None:
    width, height = value if isinstance(value, list) and len(value) == 2 else (0, 0)
    return (width, height) if type(width) is type(height) is int and min(width, height) > 0 else None


def _sizes(runs: Sequence[Mapping[str, Any]], count: int) -> Sequence[tuple[int, int] | None]:
    """Find the size at which each of `count` pictures was seen; None for all if the stats hold another number."""
    found = [size for stats in runs for size in seen_sizes_of(stats)]
    return found if len(found) == count else [None] * count


def _read(stats: str) -> dict[str, Any]:
    """Parse a run's stats; {} with a warning if they are not stats of a QwenVL node."""
    try:
        found = parse(stats.encode(errors="replace"), SETTINGS)
    except (ValueError, AttributeError, RecursionError):
        found = None
    if isinstance(found, dict) and "model" in found:
        return found
    log.warning("boxes: stats are not those of a QwenVL node, so auto does without them")
    return {}


def _tensor(pictures: Iterable[Image.Image]) -> torch.Tensor:
    """Stack pictures to floats in [0, 1]: (B, H, W, C) from RGB, (B, H, W) from grey."""
    return torch.stack([torch.from_numpy(np.asarray(picture).astype(np.float32) / 255) for picture in pictures])
