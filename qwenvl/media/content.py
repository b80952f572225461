"""Pictures and videos by their content: what is asked about again is recognised before anything is converted."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .films import Video
from .opening import MediaError
from .packets import Check
from .pixels import from_tensor

if TYPE_CHECKING:
    import torch

# Bytes and repetitions with which two hashes are compared.
_TRIED_BYTES, _TRIES = 1 << 18, 3


class TensorPicture:
    """A picture in an IMAGE tensor, converted when its pixels are first needed.

    Args:
        name: the input's name, for messages.
        image: (batch, height, width, channels) or (height, width, channels).
        number: which of a batch.
    """

    def __init__(self, name: str, image: torch.Tensor, number: int = 0) -> None:
        self._name = name
        # The tensor that was given, and no view of it, which would count as a tensor that a failed run still holds.
        self._image = image
        self._number = number
        self._rgb: Image.Image | None = None
        self.height, self.width = (int(side) for side in image.shape[-3:-1])

    @property
    def _frame(self) -> torch.Tensor:
        """(height, width, channels)."""
        return self._image[self._number] if self._image.ndim == 4 else self._image

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    def rgb(self) -> Image.Image:
        """Convert it, once; MediaError names the input if the tensor holds NaN."""
        if self._rgb is None:
            self._rgb = self.converted()
        return self._rgb

    def converted(self) -> Image.Image:
        """Convert it without keeping the result."""
        try:
            return from_tensor(self._name, self._frame)
        except ValueError as error:
            raise MediaError(f"{self._name} {error}.") from error

    def content(self) -> Iterator[Any]:
        """Yield what tells it from others: its kind, then its memory, in the order in which it lies there."""
        plain = self._frame.detach().resolve_neg().cpu()
        # A VAE's pictures lie channels first: in the order of their memory they need not be copied.
        order = sorted(range(plain.ndim), key=plain.stride, reverse=True)
        yield repr((str(plain.dtype), tuple(plain.shape), order)).encode()
        yield _bytes_of(plain.permute(order).contiguous())


class TensorVideo:
    """The sampled frames of an IMAGE batch, converted and scaled when they are first needed.

    Args:
        sampled: the frames that are shown.
        size: (width, height) to which each is scaled.
        times_s, duration_s: as in Video.
        check: called before every frame is converted; raises to cancel.
    """

    def __init__(
        self,
        sampled: Sequence[TensorPicture],
        size: tuple[int, int],
        times_s: tuple[float, ...],
        duration_s: float,
        check: Check,
    ) -> None:
        self._sampled = sampled
        self._check = check
        self._video: Video | None = None
        self.times_s, self.duration_s = times_s, duration_s
        self.shape = (len(sampled), size[1], size[0], 3)

    def with_frames(self) -> Video:
        """Convert it, once; MediaError names the input if a frame holds NaN."""
        if self._video is None:
            seen = []
            for picture in self._sampled:
                self._check()
                seen.append(np.asarray(picture.converted().resize(self.shape[2:0:-1])))
            self._video = Video(np.stack(seen), self.times_s, self.duration_s)
        return self._video

    def content(self) -> Iterator[Any]:
        """Yield what tells it from others: its times and size, then its frames as they were given."""
        yield repr((self.shape, self.times_s, self.duration_s)).encode()
        for picture in self._sampled:
            self._check()
            yield from picture.content()


# A picture or video of a question: converted already, or recognised first.
Picture = Image.Image | TensorPicture
Film = Video | TensorVideo


def rgb(picture: Picture) -> Image.Image:
    """Return the picture in RGB."""
    return picture.rgb() if isinstance(picture, TensorPicture) else picture


def with_frames(film: Film) -> Video:
    """Return the video with its frames."""
    return film.with_frames() if isinstance(film, TensorVideo) else film


def outlines(films: Sequence[Film]) -> list[Video]:
    """Return videos of the same shapes and times, without pixels: their frames take no memory."""
    shapes = [film.shape if isinstance(film, TensorVideo) else film.frames.shape for film in films]
    empty = [np.broadcast_to(np.uint8(0), shape) for shape in shapes]
    return [Video(frames, film.times_s, film.duration_s) for frames, film in zip(empty, films, strict=True)]


def convert(pictures: Sequence[Picture], films: Sequence[Film], check: Check) -> None:
    """Convert all that waits for it.

    Raises:
        MediaError: an input holds NaN; it names the input.
    """
    for picture in pictures:
        check()
        rgb(picture)
    for film in films:
        with_frames(film)


def fingerprint(pictures: Sequence[Picture], films: Sequence[Film]) -> str:
    """Return a hash of the content that is equal only for equal pictures and frames. Nothing is converted for it."""
    content = hashlib.new(_fastest_hash())
    for shown in (*pictures, *films):
        for part in _parts(shown):
            content.update(part)
    return content.hexdigest()


def _parts(shown: Picture | Film) -> Iterator[Any]:
    yield type(shown).__name__.encode()
    if isinstance(shown, TensorPicture | TensorVideo):
        yield from shown.content()
    elif isinstance(shown, Video):
        yield repr((shown.frames.shape, shown.times_s, shown.duration_s)).encode()
        yield np.ascontiguousarray(shown.frames)
    else:
        yield repr((shown.mode, shown.size)).encode()
        yield shown.tobytes()


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the memory of a contiguous tensor as bytes, not copied. NumPy knows not all of torch's types."""
    import torch

    return tensor.view(torch.uint8).numpy()


@functools.cache
def _fastest_hash() -> str:
    """Return the faster of two strong hashes: SHA-256 on a CPU with instructions for it, otherwise BLAKE2b."""
    tried = bytes(_TRIED_BYTES)

    def seconds(name: str) -> float:
        start = time.perf_counter()
        hashlib.new(name, tried)
        return time.perf_counter() - start

    return min(("sha256", "blake2b"), key=lambda name: min(seconds(name) for _ in range(_TRIES)))
