"""What a processor makes of a question: tokens and pixels. Of pictures that were asked about before, tokens alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image

from ..decoding.decoder import Decoder
from ..decoding.lanes import OwnStepLanes
from ..errors import UnusableError, WrappedErrors
from ..loading.consistency import why_unfit
from ..loading.devices import cancellable
from ..loading.loader import ModelHandle
from ..media.content import Film, Picture, convert, fingerprint, outlines, rgb, with_frames
from ..media.films import Video
from ..settings import RESOLUTIONS

# Inputs to convert to the model's precision. The seconds of a video's frames stay: 300 and 301 are equal in bfloat16.
PIXELS = ("pixel_values", "pixel_values_videos")
# The parts of a processor that make pixels.
_MAKERS = ("image_processor", "video_processor")
# What a maker returned, pixels apart, by its name in the processor.
Rest = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Shown:
    """The pictures and videos of a question, and the resolution in which the model sees pictures."""

    pictures: Sequence[Picture]
    films: Sequence[Film]
    resolution: str

    def name(self) -> str:
        """Return a text that is equal only for equal pictures and videos in equal sizes."""
        # With the resolution, because the model computes other values for a picture in another size.
        return f"{self.resolution} {fingerprint(self.pictures, self.films)}"

    def converted(self) -> tuple[list[Image.Image], list[Video]]:
        """Return all pictures and videos with their pixels."""
        return [rgb(picture) for picture in self.pictures], [_in_pairs(with_frames(film)) for film in self.films]

    def counted(self) -> tuple[list[Image.Image], list[Video]]:
        """Return as many pictures and videos, with as many frames, of one pixel each."""
        blank = [_of_one_pixel(film) for film in outlines(self.films)]
        return [Image.new("RGB", (1, 1))] * len(self.pictures), [_in_pairs(film) for film in blank]


class LaterPixels(Mapping[str, Any]):
    """Inputs whose pixels are made when they are read. Keys and values that are still there need none.

    Args:
        known: the other inputs.
        names: the inputs to make.
        make: makes them.
    """

    def __init__(self, known: Mapping[str, Any], names: Sequence[str], make: Callable[[], Mapping[str, Any]]) -> None:
        self.known = dict(known)
        self._names = names
        self._make = make
        self._made: Mapping[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        if name in self.known or name not in self._names:
            return self.known[name]
        return self._pixels()[name]

    def __contains__(self, name: object) -> bool:
        return name in self.known or name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter((*self.known, *self._names))

    def __len__(self) -> int:
        return len(self.known) + len(self._names)

    def changed(self, others: Mapping[str, Any]) -> LaterPixels:
        """Return a copy with some of the known inputs changed."""
        return LaterPixels({**self.known, **others}, self._names, self._pixels)

    def of_dtype(self, dtype: torch.dtype) -> LaterPixels:
        """Return a copy whose pixels will have that type."""
        return LaterPixels(
            self.known, self._names, lambda: {name: value.to(dtype) for name, value in self._pixels().items()}
        )

    def _pixels(self) -> Mapping[str, Any]:
        if self._made is None:
            self._made = self._make()
        return self._made


@dataclass(frozen=True, slots=True)
class _Last:
    """The last question of a decoder that was asked alone: Shown.name(), and what the makers returned."""

    name: str
    rest: Rest


_LAST: WeakKeyDictionary[Decoder, _Last] = WeakKeyDictionary()


def recognises(decoder: Decoder | None) -> bool:
    """Return True if the decoder may skip the pictures of its last question. None, in tests, may become any."""
    return decoder is None or decoder.tier == OwnStepLanes.name


def recall(decoder: Decoder | None, name: str) -> Rest | None:
    """Return what the makers returned for the same pictures and videos, if the last question showed these."""
    last = _LAST.get(decoder) if decoder is not None else None
    return last.rest if last and last.name == name else None


def remember(decoder: Decoder | None, name: str, rest: Rest) -> None:
    """Keep what the makers returned for the question that the decoder answers now."""
    if decoder is not None:
        _LAST[decoder] = _Last(name, rest)


def tokenize(handle: ModelHandle, text: str, shown: Shown, rest: Rest | None = None) -> tuple[dict[str, Any], Rest]:
    """Return a question's inputs, on the CPU, and what the makers returned.

    Args:
        rest: what the makers returned for the same pictures and videos. Then nothing is converted or processed, and
            the inputs lack pixels.

    Raises:
        UnusableError: the processor does not fit the model.
    """
    processor = handle.processor
    if processor is None:
        return dict(handle.tokenizer(text, return_tensors="pt")), {}
    if shown.films and (reason := why_unfit(processor.video_processor, handle.model.config.vision_config)):
        raise UnusableError(f"Videos cannot be shown to this model: {reason}.")
    pictures, films = shown.counted() if rest is not None else shown.converted()
    makers = {name: _Maker(getattr(processor, name), (rest or {}).get(name)) for name in _MAKERS}
    inputs = _processed(_with(processor, makers), text, pictures, films, shown.resolution)
    if "second_per_grid_ts" in inputs:
        # For Qwen2.5-VL. transformers 5 computes them from the metadata, version 4 from one rate for all videos.
        joined = processor.video_processor.temporal_patch_size
        rates = [len(film.frames) / max(film.duration_s, 0.001) for film in films]  # sampled frames a second
        inputs["second_per_grid_ts"] = torch.tensor([joined / rate for rate in rates])
    return inputs, {name: maker.rest for name, maker in makers.items() if maker.rest is not None}


def later_pixels(
    handle: ModelHandle, text: str, shown: Shown, known: Mapping[str, Any], check: Callable[[], None]
) -> LaterPixels:
    """Return inputs whose pixels are made if they are read, on the model's device. They do not keep the model alive."""
    device, dtype, processor, model = handle.model.device, handle.model.dtype, handle.processor, handle.spec.model
    names = [name for name, some in zip(PIXELS, (shown.pictures, shown.films), strict=True) if some]

    def make() -> dict[str, Any]:
        convert(shown.pictures, shown.films, check)
        with unusable(model), cancellable(check):
            inputs = _processed(processor, text, *shown.converted(), shown.resolution)
        return {name: to(inputs[name], device, dtype) for name in names}

    return LaterPixels(known, names, make)


def unusable(model: str) -> WrappedErrors:
    """Wrap errors of the model's tokenizer and processor."""
    return WrappedErrors(f"The tokenizer or processor of {model} cannot be used", UnusableError)


class _Maker:
    """A maker of pixels; or a stand-in, which returns what it returned before, pixels apart.

    Attributes:
        rest: what it returned, pixels apart; None if it was not called.
    """

    def __init__(self, real: Any, rest: dict[str, Any] | None) -> None:
        self._real = real
        self._again = rest is not None
        self.rest = rest

    def __call__(self, *given: Any, **how: Any) -> Any:
        if self._again:
            # Copied, because processors take parts out and lengthen lists.
            return copy.deepcopy(self.rest)
        made = self._real(*given, **how)
        self.rest = {name: copy.deepcopy(value) for name, value in made.items() if name not in PIXELS}
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _with(processor: Any, makers: Mapping[str, Any]) -> Any:
    """Return a copy of the processor with other makers; the processor itself stays as it is."""
    other = copy.copy(processor)
    for name, maker in makers.items():
        setattr(other, name, maker)
    return other


def _processed(
    processor: Any, text: str, pictures: Sequence[Image.Image], films: Sequence[Video], resolution: str
) -> dict[str, Any]:
    given: dict[str, Any] = {"text": [text]}
    if pictures:
        given |= {"images": list(pictures), "images_kwargs": _size(processor.image_processor, resolution)}
    if films:
        given |= {
            "videos": [torch.from_numpy(film.frames).permute(0, 3, 1, 2) for film in films],
            "videos_kwargs": _timing(films),
        }
    inputs = processor(return_tensors="pt", **given)
    return {key: value for key, value in inputs.items() if key != "video_metadata"}


def _size(images: Any, resolution: str) -> dict[str, Any]:
    """Return the picture size as keywords of one call, so that the processor itself stays unchanged. Always a new
    dictionary, because transformers 4 empties it."""
    pixels = RESOLUTIONS[resolution]
    if pixels is None:
        return {}
    low, high = pixels
    size: dict[str, Any] = {"size": {"shortest_edge": low, "longest_edge": high}}
    # transformers 4 prefers these if the model's folder sets them; version 5 accepts them as older names.
    if getattr(images, "max_pixels", None):
        size |= {"min_pixels": low, "max_pixels": high}
    return size


def _timing(videos: Sequence[Video]) -> dict[str, Any]:
    """Return the processor's keywords for the frames' times in milliseconds, as if videos had 1,000 frames a second."""
    metadata = [
        {
            "fps": 1000.0,
            "total_num_frames": max(1, round(video.duration_s * 1000)),
            "duration": video.duration_s,
            "frames_indices": [round(time * 1000) for time in video.times_s],
        }
        for video in videos
    ]
    return {"video_metadata": metadata, "do_sample_frames": False}


def _of_one_pixel(video: Video) -> Video:
    return replace(video, frames=np.zeros((len(video.frames), 1, 1, 3), np.uint8))


def _in_pairs(video: Video) -> Video:
    """Repeat a single frame: processors join two frames and need at least two."""
    if len(video.frames) > 1:
        return video
    return replace(video, frames=video.frames.repeat(2, axis=0), times_s=video.times_s * 2)


def to(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Move a tensor, and convert it if a type is given; other values stay."""
    return value.to(device, dtype) if isinstance(value, torch.Tensor) else value
