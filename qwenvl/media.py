"""Pictures and videos, as ComfyUI or the command line hand them over, into what a Qwen processor takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

# Video sampling. Qwen's own video processors use the same lower limit; the upper ones keep 64 frames
# at about 8,000 tokens.
FRAMES_PER_SECOND = 1.0
MIN_FRAMES = 4
MAX_FRAMES = 64
MAX_FRAME_PIXELS = 768 * 28 * 28
MAX_VIDEO_PIXELS = MAX_FRAMES * 256 * 28 * 28


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
        if isinstance(image, Image.Image):
            found.append(_as_rgb(image))
        else:
            found += [_from_file(name, Path(image))] if isinstance(image, (str, Path)) else _from_tensor(name, image)
    return found


def _from_file(name: str, path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return _as_rgb(ImageOps.exif_transpose(picture))
    except FileNotFoundError as error:
        raise MediaError(f"{name}: there is no file {str(path)!r}.") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise MediaError(f"{name}: {str(path)!r} cannot be read as a picture ({error}).") from error


def _from_tensor(name: str, image: torch.Tensor) -> list[Image.Image]:
    batch = image.unsqueeze(0) if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4):
        raise MediaError(
            f"{name} must have the shape (batch, height, width, 1, 3 or 4 channels), got {tuple(image.shape)}."
        )
    if 0 in batch.shape:
        raise MediaError(f"{name} is empty: its shape is {tuple(image.shape)}. Connect an image, or nothing.")
    values = batch.float().cpu().numpy()
    if np.isnan(values).any():
        raise MediaError(f"{name} holds NaN: the node that made it went wrong (often a VAE decode in fp16).")
    pixels = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return [_as_rgb(Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each)) for each in pixels]


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Transparent parts become white, as in Qwen's own preprocessing."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def read_video(path: str) -> Video:
    """Decode and sample a video file: FRAMES_PER_SECOND, at least MIN_FRAMES where it has so many, at most MAX_FRAMES.

    Raises:
        MediaError: the file is missing, cannot be read, or holds no picture stream; it names the path.
    """
    import av

    if not Path(path).is_file():
        raise MediaError(f"video_path: there is no file {path!r}.")
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise MediaError(f"video_path: {path!r} holds no video stream.")
            return _sample(path, container, container.streams.video[0])
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"video_path: {path!r} cannot be read as a video ({error}).") from error


def _sample(path: str, container: Any, stream: Any) -> Video:
    """Two passes: the first reads the times without decoding, the second keeps the frames that were picked."""
    times = sorted(float(p.pts * p.time_base) for p in container.demux(stream) if p.pts is not None)
    if not times:
        raise MediaError(f"video_path: {path!r} holds no frame.")
    start = times[0]
    duration = times[-1] - start + (times[-1] - start) / max(1, len(times) - 1)
    wanted = [times[i] for i in pick_frames(len(times), duration)]
    size = _frame_size(stream.width, stream.height, len(wanted))
    container.seek(0, stream=stream)
    frames = [(time - start, frame) for time, frame in _frames_at(container, stream, wanted, size)]
    if not frames:
        raise MediaError(f"video_path: no frame of {path!r} could be decoded.")
    return Video(np.stack([f for _, f in frames]), tuple(t for t, _ in frames), duration)


def pick_frames(total: int, duration_s: float) -> list[int]:
    """Indices of the frames to keep, evenly spread from the first to the last, an even number where possible.

    Qwen joins frames in pairs, so an odd number would only repeat the last one.
    """
    count = round(duration_s * FRAMES_PER_SECOND / 2) * 2
    count = min(max(count, MIN_FRAMES), MAX_FRAMES, total - total % 2 or total)
    return [round(i) for i in np.linspace(0, total - 1, count)]


def fingerprint(pictures: list[Image.Image], video: Video | None) -> str:
    """A name for the content: equal for equal pictures and frames only."""
    content = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        content.update(repr(picture.size).encode() + picture.tobytes())
    if video:
        content.update(repr((video.frames.shape, video.times_s)).encode() + video.frames.tobytes())
    return content.hexdigest()


def _frame_size(width: int, height: int, frames: int) -> tuple[int, int]:
    """(width, height) that keeps one frame and all frames together within the pixel budget."""
    budget = min(MAX_FRAME_PIXELS, MAX_VIDEO_PIXELS / frames)
    scale = min(1.0, (budget / (width * height)) ** 0.5)
    return max(2, round(width * scale)), max(2, round(height * scale))


def _frames_at(
    container: Any, stream: Any, wanted: list[float], size: tuple[int, int]
) -> Iterator[tuple[float, np.ndarray]]:
    """(time, frame) for each wanted time in rising order: the first decoded frame that is not earlier."""
    stream.thread_type = "AUTO"
    taken = 0
    for frame in container.decode(stream):
        if taken == len(wanted):
            return
        if frame.time is not None and frame.time >= wanted[taken] - 1e-6:
            yield frame.time, frame.to_ndarray(width=size[0], height=size[1], format="rgb24")
            taken += 1
