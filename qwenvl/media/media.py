"""Turns pictures and videos, as ComfyUI or the command line give them, into what a Qwen processor takes."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..checks import shown
from ..request import Frames, Request
from .content import Film, Picture, TensorPicture, TensorVideo, rgb, with_frames
from .films import Video, frame_size, pick_frames, read_video
from .opening import BROKEN_PICTURE, MediaError, read_picture, require_shape
from .packets import Check
from .pixels import as_rgb

if TYPE_CHECKING:
    import torch


def pictures(images: Mapping[str, Any], check: Check = lambda: None) -> list[Image.Image]:
    """Read all pictures of all inputs, in order, as RGB: shown_pictures(), converted."""
    found = []
    for picture in shown_pictures(images, check):
        check()
        found.append(rgb(picture))
    return found


def shown_pictures(images: Mapping[str, Any], check: Check = lambda: None) -> list[Picture]:
    """Read all pictures of all inputs, in order, without converting tensors.

    Args:
        images: input name -> IMAGE tensor (B, H, W, C) or (H, W, C), float in [0, 1], C of 1, 3 or 4,
            or the path of a picture file, or a PIL image.
        check: called before every input; raises to cancel.

    Raises:
        MediaError: an input is empty, has another shape, or is not a picture; it names the input. Only when a tensor
            is converted, the same if it holds NaN.
    """
    found: list[Picture] = []
    for name, image in images.items():
        check()
        read: Sequence[Picture]
        if isinstance(image, (str, Path)):
            read = [_from_file(name, Path(image))]
        else:
            read = [_from_pil(name, image)] if isinstance(image, Image.Image) else _from_tensor(name, image)
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


def _from_tensor(name: str, image: torch.Tensor) -> list[TensorPicture]:
    _require_image(name, image)
    # One frame at a time: a batch may be a whole video, and a copy of it would not fit into memory.
    return [TensorPicture(name, image, number) for number in range(len(image) if image.ndim == 4 else 1)]


def _require_image(name: str, image: torch.Tensor) -> None:
    if not hasattr(image, "ndim") or not hasattr(image, "is_complex") or image.is_complex():
        raise MediaError(f"{name} must be an IMAGE of numbers, got {type(image).__name__}.")
    if image.ndim not in (3, 4) or image.shape[-1] not in (1, 3, 4):
        raise MediaError(
            f"{name} must have the shape (batch, height, width, 1, 3 or 4 channels), got {tuple(image.shape)}."
        )
    if 0 in image.shape:
        raise MediaError(f"{name} is empty: its shape is {tuple(image.shape)}. Connect an image, or nothing.")


def videos(request: Request, check: Check = lambda: None) -> list[Video]:
    """Read all videos of a request, with their frames: shown_videos(), converted."""
    return [with_frames(film) for film in shown_videos(request, check)]


def shown_videos(request: Request, check: Check = lambda: None) -> list[Film]:
    """Read all videos of a request without converting tensors, in this order: video_frames, video, video_path.

    Args:
        check: called again and again; raises to cancel.

    Raises:
        MediaError: a video cannot be used; it names the input. Only when a tensor is converted, the same if it
            holds NaN.
    """
    given = (request.video_frames is not None, request.video is not None, bool(request.video_path))
    if not any(given):
        return []
    frames = replace(request.frames, max_video_tokens=request.frames.max_video_tokens // sum(given))
    found: list[Film] = []
    if given[0]:
        found.append(_from_batch("video_frames", request.video_frames, frames.fps, frames, check))
    if given[1]:
        found.append(_from_stream("video", request.video, frames, check))
    if given[2]:
        found.append(read_video("video_path", request.video_path, frames, check=check))
    return found


def _from_stream(name: str, video: Any, frames: Frames, check: Check) -> Film:
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


def _from_batch(name: str, batch: torch.Tensor, fps: float, frames: Frames, check: Check = lambda: None) -> TensorVideo:
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
    _require_image(name, batch)
    sampled = [TensorPicture(name, batch, index) for index in picked]
    return TensorVideo(sampled, size, tuple(index / fps for index in picked), duration, check)
