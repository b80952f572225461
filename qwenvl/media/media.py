"""Pictures and videos, as ComfyUI or the command line hand them over, into what a Qwen processor takes."""

from __future__ import annotations

import hashlib
import inspect
import io
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..checks import shown
from ..log import log
from ..request import Frames, Request
from .opening import BROKEN_PICTURE, open_film, read_picture
from .pixels import as_rgb, from_tensor

if TYPE_CHECKING:
    import torch

MOST_NARROW = 200
# Qwen's own video processors use the same lower limit.
MIN_FRAMES = 4
# A token is so many pixels of each of two frames, in the families that need the most.
TOKEN_PIXELS = 28 * 28
# Frames are made smaller to this size so that many fit; where it is not enough, fewer are shown.
SMALLEST_FRAME_PIXELS = 256 * 28 * 28
# Smaller frames are enlarged; older processors of Qwen3-VL refuse them.
SMALLEST_FRAME_SIDE = 32

# A frame that claims more would take gigabytes before it shows that it holds nothing.
MOST_FRAME_PIXELS = 1 << 26


class MediaError(ValueError):
    """A picture or a video cannot be used."""


@dataclass(frozen=True, slots=True)
class Video:
    """Sampled frames, (T, H, W, 3) uint8 RGB, and the time of each in seconds from the start."""

    frames: np.ndarray
    times_s: tuple[float, ...]
    duration_s: float


def pictures(images: Mapping[str, Any]) -> list[Image.Image]:
    """All pictures of all inputs, in order, as RGB.

    Args:
        images: input name -> IMAGE tensor (B, H, W, C) or (H, W, C), float in [0, 1], C of 1, 3 or 4,
            or the path of a picture file, or a PIL image.

    Raises:
        MediaError: an input is empty, holds NaN, has another shape, or is no picture; it names the input.
    """
    found: list[Image.Image] = []
    for name, image in images.items():
        if isinstance(image, (str, Path)):
            made = [_from_file(name, Path(image))]
        else:
            made = [_from_pil(name, image)] if isinstance(image, Image.Image) else _from_tensor(name, image)
        for picture in made:
            _require_shape(name, picture.size)
        found += made
    return found


def _require_shape(name: str, size: tuple[int, int]) -> None:
    """Qwen's processors take no narrower ones, and say so in words that name no input."""
    width, height = size
    if max(width, height) > MOST_NARROW * min(width, height):
        raise MediaError(
            f"{name} is {width} x {height} pixels: a picture may be at most {MOST_NARROW} times as long as it is wide."
        )


def _from_file(name: str, path: Path) -> Image.Image:
    try:
        return as_rgb(name, read_picture(name, path))
    except FileNotFoundError as error:
        raise MediaError(f"{name}: there is no file {str(path)!r}.") from error
    except BROKEN_PICTURE as error:
        raise MediaError(f"{name}: {str(path)!r} cannot be read as a picture ({shown(str(error))}).") from error


def _from_pil(name: str, image: Image.Image) -> Image.Image:
    try:
        return as_rgb(name, image)
    except BROKEN_PICTURE as error:
        raise MediaError(f"{name} cannot be read as a picture ({shown(str(error))}).") from error


def _from_tensor(name: str, image: torch.Tensor) -> list[Image.Image]:
    if not hasattr(image, "ndim") or not hasattr(image, "is_complex") or image.is_complex():
        raise MediaError(f"{name} must be an IMAGE of numbers, got {type(image).__name__}.")
    batch = image.unsqueeze(0) if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4):
        raise MediaError(
            f"{name} must have the shape (batch, height, width, 1, 3 or 4 channels), got {tuple(image.shape)}."
        )
    if 0 in batch.shape:
        raise MediaError(f"{name} is empty: its shape is {tuple(image.shape)}. Connect an image, or nothing.")
    # One after the other: a batch may be a whole video, of which copies would not fit.
    try:
        return [from_tensor(name, each) for each in batch]
    except ValueError as error:
        raise MediaError(f"{name} {error}.") from error


def videos(request: Request) -> list[Video]:
    """All videos of a request, in the order in which they are shown: video_frames, video, video_path.

    Raises:
        MediaError: one cannot be used; it names the input.
    """
    given = (request.video_frames is not None, request.video is not None, bool(request.video_path))
    if not any(given):
        return []
    frames = replace(request.frames, max_video_tokens=request.frames.max_video_tokens // sum(given))
    found = []
    if given[0]:
        found.append(_from_batch("video_frames", request.video_frames, frames.fps, frames))
    if given[1]:
        found.append(_from_stream("video", request.video, frames))
    if given[2]:
        found.append(read_video("video_path", request.video_path, frames))
    return found


def read_video(
    name: str, source: str | io.BytesIO, frames: Frames, start_s: float = 0.0, duration_s: float = 0.0
) -> Video:
    """Decode and sample a video, at least MIN_FRAMES where it has so many; only what is kept is held in memory.

    Args:
        name: the input, for messages.
        source: a path, or the content of a file.
        start_s, duration_s: the part of it that counts; 0 seconds reach to the end.

    Raises:
        MediaError: it is missing, cannot be read, or holds no picture stream; it names the input and the path.
    """
    import av

    told = f"{name}: {source!r}" if isinstance(source, str) else f"{name}: the video"
    try:
        if isinstance(source, str) and not Path(source).is_file():
            raise MediaError(f"{name}: there is no file {source!r}.")
        with open_film(source) as container:
            if not container.streams.video:
                raise MediaError(f"{told} holds no video stream.")
            return _sample(told, container, frames, start_s, duration_s)
    except (av.FFmpegError, *BROKEN_PICTURE) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{told} cannot be read as a video ({shown(str(error))}).") from error


def _from_stream(name: str, video: Any, frames: Frames) -> Video:
    """ComfyUI's VIDEO. A trimmed one hands over the whole stream and tells the part that counts."""
    if not hasattr(video, "get_stream_source"):
        raise MediaError(f"{name} must be a VIDEO, got {type(video).__name__}. An IMAGE batch goes into video_frames.")
    if _holds_its_frames(video):
        parts = video.get_components()
        return _from_batch(name, parts.images, float(parts.frame_rate), frames)
    source = video.get_stream_source()
    # Other nodes read from the same object, each from its own place in it.
    source = io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else str(source)
    # Older versions of ComfyUI have no trimming.
    window = video.get_active_trim_window() if hasattr(video, "get_active_trim_window") else (0.0, 0.0)
    return read_video(name, source, frames, *window)


def _holds_its_frames(video: Any) -> bool:
    """Whether a stream would have to be made of frames that are in memory: the base class's way to have one."""
    owner = next(each for each in type(video).__mro__ if "get_stream_source" in vars(each))
    return inspect.isabstract(owner)


def _from_batch(name: str, batch: torch.Tensor, fps: float, frames: Frames) -> Video:
    """Frames that are there already; only those that are shown are converted."""
    if getattr(batch, "ndim", 0) != 4 or 0 in batch.shape:
        shape = tuple(getattr(batch, "shape", ()))
        raise MediaError(f"{name} must have the shape (frames, height, width, channels), got {shape}.")
    if not 0 < fps < float("inf"):
        raise MediaError(f"{name} has {fps:g} frames a second, which cannot be played.")
    total, height, width = batch.shape[:3]
    _require_shape(name, (width, height))
    duration = total / fps
    picked = pick_frames(name, total, duration, (width, height), frames)
    size = _frame_size(width, height, len(picked), frames)
    seen = [np.asarray(_from_tensor(name, batch[index])[0].resize(size)) for index in picked]
    return Video(np.stack(seen), tuple(index / fps for index in picked), duration)


def _sample(name: str, container: Any, frames: Frames, start_s: float, duration_s: float) -> Video:
    """Two passes: the first reads the times without decoding, the second keeps the frames that were picked."""
    stream = container.streams.video[0]
    packets = [(float(p.pts * p.time_base), p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
    end = start_s + duration_s if duration_s else float("inf")
    times = sorted(time for time, _ in packets if start_s - 1e-6 <= time < end - 1e-6)
    if not times:
        where = f" between {start_s:g} and {end:g} s" if packets else ""
        raise MediaError(f"{name} holds no frame{where}.")
    start = times[0]
    duration = times[-1] - start + (times[-1] - start) / max(1, len(times) - 1)
    # A stream of an unknown codec has neither.
    size = (getattr(stream, "width", 0), getattr(stream, "height", 0))
    if not 0 < size[0] * size[1] <= MOST_FRAME_PIXELS:
        raise MediaError(f"{name}: frames of {size[0]} x {size[1]} pixels, or of an unknown codec, are not read.")
    _require_shape(name, size)
    wanted = [times[i] for i in pick_frames(name, len(times), duration, size, frames)]
    keys = sorted(time for time, is_key in packets if is_key)
    size = _frame_size(*size, len(wanted), frames)
    found = [
        (time - start, frame.to_ndarray(width=size[0], height=size[1], format="rgb24"))
        for time, frame in _frames_at(container, stream, wanted, keys)
    ]
    if not found:
        raise MediaError(f"{name}: no frame of it could be decoded.")
    return Video(np.stack([frame for _, frame in found]), tuple(time for time, _ in found), duration)


def pick_frames(name: str, total: int, duration_s: float, size: tuple[int, int], frames: Frames) -> list[int]:
    """Indices of the frames to keep, evenly spread from the first to the last, an even number where possible.

    Qwen joins frames in pairs, so an odd number would only repeat the last one. Where frames of the smallest size
    would still have too many tokens, fewer are kept, and the log says so.
    """
    wanted = max(round(duration_s * frames.sample_fps / 2) * 2, MIN_FRAMES)
    wanted = min(wanted, _even(frames.max_frames), _even(total))
    smallest = min(SMALLEST_FRAME_PIXELS, frames.max_frame_pixels, size[0] * size[1])
    count = min(wanted, max(2, _even(frames.max_video_tokens * 2 * TOKEN_PIXELS // smallest)))
    if count < wanted:
        log.warning("%s: %d frames instead of %d, for at most %d tokens", name, count, wanted, frames.max_video_tokens)
    return [round(i) for i in np.linspace(0, total - 1, count)]


def _even(count: int) -> int:
    """The same or one less, but for a single one."""
    return count - count % 2 or count


def fingerprint(pictures: Sequence[Image.Image], shown: Sequence[Video]) -> str:
    """A name for the content: equal for equal pictures and frames only."""
    content = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        content.update(repr(picture.size).encode() + picture.tobytes())
    for video in shown:
        content.update(repr((video.frames.shape, video.times_s)).encode() + video.frames.tobytes())
    return content.hexdigest()


def _frame_size(width: int, height: int, count: int, frames: Frames) -> tuple[int, int]:
    """(width, height) that keeps one frame and all frames together within the pixel budget."""
    budget = min(frames.max_frame_pixels, frames.max_video_tokens * 2 * TOKEN_PIXELS / count)
    scale = min(1.0, (budget / (width * height)) ** 0.5)
    scale = max(scale, SMALLEST_FRAME_SIDE / min(width, height))
    return max(2, round(width * scale)), max(2, round(height * scale))


def _frames_at(container: Any, stream: Any, wanted: list[float], keys: list[float]) -> Iterator[tuple[float, Any]]:
    """(time, frame) for each wanted time in rising order: the first decoded frame that is not earlier.

    Args:
        keys: times of the frames from which decoding can begin. What lies before the last of them is not decoded.
    """
    stream.thread_type = "AUTO"
    decoded: Iterator[Any] = iter(())
    reached = float("-inf")
    for time in wanted:
        before = bisect_right(keys, time + 1e-6)
        key = keys[before - 1] if before else 0.0
        if key > reached:
            container.seek(round(key / stream.time_base), stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            if frame.time is not None and frame.time >= time - 1e-6:
                reached = frame.time
                yield frame.time, frame
                break
