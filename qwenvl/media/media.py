"""Turns pictures and videos, as ComfyUI or the command line give them, into what a Qwen processor takes."""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..checks import shown
from ..request import Frames, Request
from .films import Video, frame_size, pick_frames, read_video
from .opening import BROKEN_PICTURE, MediaError, read_picture, require_shape
from .packets import Check
from .pixels import as_rgb, from_tensor

if TYPE_CHECKING:
    import torch


def pictures(images: Mapping[str, Any], check: Check = lambda: None) -> list[Image.Image]:
    """Read all pictures of all inputs, in order, as RGB.

    Args:
        images: input name -> IMAGE tensor (B, H, W, C) or (H, W, C), float in [0, 1], C of 1, 3 or 4,
            or the path of a picture file, or a PIL image.
        check: called before every picture; raises to cancel.

    Raises:
        MediaError: an input is empty, holds NaN, has another shape, or is not a picture; it names the input.
    """
    found: list[Image.Image] = []
    for name, image in images.items():
        check()
        if isinstance(image, (str, Path)):
            read = [_from_file(name, Path(image))]
        else:
            read = [_from_pil(name, image)] if isinstance(image, Image.Image) else _from_tensor(name, image, check)
        for picture in read:
            require_shape(name, picture.size)
        found += read
    return found


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


def _from_tensor(name: str, image: torch.Tensor, check: Check) -> list[Image.Image]:
    if not hasattr(image, "ndim") or not hasattr(image, "is_complex") or image.is_complex():
        raise MediaError(f"{name} must be an IMAGE of numbers, got {type(image).__name__}.")
    batch = image.unsqueeze(0) if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4):
        raise MediaError(
            f"{name} must have the shape (batch, height, width, 1, 3 or 4 channels), got {tuple(image.shape)}."
        )
    if 0 in batch.shape:
        raise MediaError(f"{name} is empty: its shape is {tuple(image.shape)}. Connect an image, or nothing.")
    # One frame at a time: a batch may be a whole video, and a copy of it would not fit into memory.
    pictures = []
    try:
        for frame in batch:
            check()
            pictures.append(from_tensor(name, frame))
    except ValueError as error:
        raise MediaError(f"{name} {error}.") from error
    return pictures


def videos(request: Request, check: Check = lambda: None) -> list[Video]:
    """Read all videos of a request, in the order in which they are shown: video_frames, video, video_path.

    Args:
        check: called again and again; raises to cancel.

    Raises:
        MediaError: a video cannot be used; it names the input.
    """
    given = (request.video_frames is not None, request.video is not None, bool(request.video_path))
    if not any(given):
        return []
    frames = replace(request.frames, max_video_tokens=request.frames.max_video_tokens // sum(given))
    found = []
    if given[0]:
        found.append(_from_batch("video_frames", request.video_frames, frames.fps, frames, check))
    if given[1]:
        found.append(_from_stream("video", request.video, frames, check))
    if given[2]:
        found.append(read_video("video_path", request.video_path, frames, check=check))
    return found


def _from_stream(name: str, video: Any, frames: Frames, check: Check) -> Video:
    """Read ComfyUI's VIDEO. A trimmed one gives the whole stream, and apart from it the part to show."""
    if not hasattr(video, "get_stream_source"):
        raise MediaError(f"{name} must be a VIDEO, got {type(video).__name__}. An IMAGE batch goes into video_frames.")
    if _holds_its_frames(video):
        parts = video.get_components()
        return _from_batch(name, parts.images, float(parts.frame_rate), frames, check)
    source = video.get_stream_source()
    # A copy, because other nodes read from the same object and would move its position.
    source = io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else str(source)
    # Older versions of ComfyUI have no trimming.
    start_s, duration_s = video.get_active_trim_window() if hasattr(video, "get_active_trim_window") else (0.0, 0.0)
    return read_video(name, source, frames, start_s, duration_s, check)


def _holds_its_frames(video: Any) -> bool:
    """Tell if the video holds its frames in memory: then the base class would have to encode them into a stream."""
    owner = next(ancestor for ancestor in type(video).__mro__ if "get_stream_source" in vars(ancestor))
    return inspect.isabstract(owner)


def _from_batch(name: str, batch: torch.Tensor, fps: float, frames: Frames, check: Check = lambda: None) -> Video:
    """Sample a batch of frames, (frames, height, width, channels); only frames that are shown are converted."""
    if getattr(batch, "ndim", 0) != 4 or 0 in batch.shape:
        shape = tuple(getattr(batch, "shape", ()))
        raise MediaError(f"{name} must have the shape (frames, height, width, channels), got {shape}.")
    if not 0 < fps < float("inf"):
        raise MediaError(f"{name} has {fps:g} frames a second, which cannot be played.")
    total, height, width = batch.shape[:3]
    require_shape(name, (width, height))
    duration = total / fps
    picked = pick_frames(name, total, duration, (width, height), frames)
    size = frame_size(width, height, len(picked), frames)
    seen = [np.asarray(_from_tensor(name, batch[index], check)[0].resize(size)) for index in picked]
    return Video(np.stack(seen), tuple(index / fps for index in picked), duration)


def fingerprint(pictures: Sequence[Image.Image], shown: Sequence[Video]) -> str:
    """Return a hash of the content that is equal only for equal pictures and frames."""
    content = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        content.update(repr(picture.size).encode() + picture.tobytes())
    for video in shown:
        content.update(repr((video.frames.shape, video.times_s)).encode() + video.frames.tobytes())
    return content.hexdigest()
