"""The node QwenVL Boxes: an answer with boxes and its picture in; the picture with boxes, a mask, the boxes out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import boxes, host, media
from .checks import checked, one_of, text_of
from .lists import first
from .loader import PICTURE_PIXELS
from .log import log
from .settings import RESOLUTIONS


class BoxesError(ValueError):
    """Answers cannot be paired with pictures."""


class QwenVLBoxes:
    """INPUT_IS_LIST: a batch has one text for each of its pictures, which ComfyUI would not pair by itself."""

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
                        "tooltip": "As in the QwenVL node. It matters where the answer counts pixels: those of the "
                        "picture after it was scaled.",
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
        text = [text_of("text", each) for each in text]
        one_of("coordinates", first(coordinates), boxes.COORDINATES)
        one_of("image_resolution", first(image_resolution), tuple(RESOLUTIONS))
        batches = [media.pictures({"image": batch}) for batch in image]
        count = sum(len(batch) for batch in batches)
        if len(text) not in (1, count):
            raise BoxesError(
                f"There are {len(text)} texts for {count} pictures. Connect the image that the QwenVL node was asked "
                "about; with several pictures set its image_mode to 'one answer per image'."
            )
        answers = iter(text if len(text) == count else text * count)
        how = _Counting(coordinates[0], _model(stats), RESOLUTIONS[image_resolution[0]] or PICTURE_PIXELS)
        marked = [[(picture, *_found(picture, next(answers), how)) for picture in batch] for batch in batches]
        told = [line for batch in marked for _, _, line in batch]
        host.NodeWatch(1).end("\n".join(told))
        return {
            "ui": {"text": told},
            "result": (
                [_tensor(boxes.draw(picture, marks) for picture, marks, _ in batch) for batch in marked],
                [_tensor(boxes.mask(picture.size, marks) for picture, marks, _ in batch) for batch in marked],
                [[boxes.as_bounding_boxes(marks) for _, marks, _ in batch] for batch in marked],
            ),
        }


@dataclass(frozen=True, slots=True)
class _Counting:
    """What the numbers of an answer count."""

    coordinates: str
    model: str
    # What pictures were scaled to: at least and at most so many pixels.
    pixels: tuple[int, int]

    def unit(self, marks: Sequence[boxes.Mark], size: tuple[int, int]) -> tuple[int, int]:
        """How far the numbers reach to the right and down on a picture of that (width, height)."""
        thousand = (boxes.THOUSAND, boxes.THOUSAND)
        if self.coordinates == "0-1000" or not marks:
            return thousand
        seen = self._seen(*size)
        return seen if self.coordinates == "pixels" or boxes.counts_pixels(marks, seen, self.model) else thousand

    def _seen(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the picture as it was scaled for Qwen2.5-VL, which counts in these pixels."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        low, high = self.pixels
        height, width = smart_resize(height, width, min_pixels=low, max_pixels=high)
        return width, height


def _found(picture: Image.Image, answer: str, how: _Counting) -> tuple[list[boxes.Mark], str]:
    """What the answer found in the picture, in its pixels, and a line about it."""
    marks, problems = boxes.read(answer)
    placed, outside = boxes.place(marks, how.unit(marks, picture.size), picture.size)
    if not marks:
        outside = ["there is no bbox_2d or point_2d in the answer"]
    for problem in [*problems, *outside]:
        log.warning("boxes: %s", problem)
    labels = ", ".join(mark.label for mark in placed if mark.label)
    found = f"{len(placed)} found: {labels}" if labels else f"{len(placed)} found"
    return placed, "; ".join([found, *problems, *outside])


def _model(stats: Sequence[str]) -> str:
    """The model's name in a run's stats; nothing where there are none."""
    try:
        return str(json.loads(stats[0])["model"]) if stats else ""
    except (ValueError, KeyError, TypeError, RecursionError):
        log.warning("boxes: stats are not those of a QwenVL node, so auto does without them")
        return ""


def _tensor(pictures: Iterable[Image.Image]) -> torch.Tensor:
    """(B, H, W, C) from RGB, (B, H, W) from grey; float in [0, 1]."""
    return torch.stack([torch.from_numpy(np.asarray(picture).astype(np.float32) / 255) for picture in pictures])
