"""Reads from a film the frames that a model is shown, as a player would show them, each with its time."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import shown
from ..log import log
from ..request import Frames
from .film_index import require_small_index
from .opening import BROKEN_PICTURE, MediaError, open_film, require_shape
from .packets import Check, film_stream
from .timeline import FrameReader, Source, Timeline, read_timeline

# Qwen's own video processors use the same lower limit.
MIN_FRAMES = 4
# Pixels per token, in each of two frames, in the families that need the most tokens.
TOKEN_PIXELS = 28 * 28
# Frames are shrunk down to this size so that many fit; if that is not enough, fewer are shown.
SMALLEST_FRAME_PIXELS = 256 * 28 * 28
# Frames with a shorter side are enlarged: older processors of Qwen3-VL refuse them.
SMALLEST_FRAME_SIDE = 32
# A broken film that claims more would take gigabytes of memory before it is found to be empty.
MOST_FRAME_PIXELS = 1 << 26
# Limit of a pixel's aspect ratio. Real films stay below about 4; more is a mistake in the file.
MOST_SQUEEZED = 16
# A trimmed part may begin this long before its first frame: like ComfyUI, we then begin with that frame.
_SHORT_S = 0.2
# Times that differ by less count as equal.
_SAME_S = 1e-6


@dataclass(frozen=True, slots=True)
class Video:
    """Sampled frames, (T, H, W, 3) uint8 RGB, and the time of each in seconds from the start."""

    frames: np.ndarray
    times_s: tuple[float, ...]
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a film: its frames in the timeline, and its start and end by the clock of the file."""

    numbers: range
    start_s: float
    end_s: float


def read_video(
    name: str,
    source: Source,
    frames: Frames,
    start_s: float = 0.0,
    duration_s: float = 0.0,
    check: Check = lambda: None,
) -> Video:
    """Decode and sample a video: at least MIN_FRAMES, if it has them. Only sampled frames are held in memory.

    Args:
        name: the input, for messages.
        source: a path, or the content of a file.
        start_s, duration_s: the part to read, in a player's seconds; a duration of 0 reaches to the end.
        check: called again and again; raises to cancel.

    Raises:
        MediaError: the file is missing, cannot be read, or holds no picture stream; it names the input and the path.
    """
    import av

    film = f"{name}: {source!r}" if isinstance(source, str) else f"{name}: the video"
    try:
        if isinstance(source, str) and not Path(source).is_file():
            raise MediaError(f"{name}: there is no file {source!r}.")
        require_small_index(source, check)
        size = _shown_size(film, source)
        timeline = read_timeline(film, source, check)
        return _sample(film, FrameReader(source, timeline, check), timeline, size, frames, (start_s, duration_s))
    except (av.FFmpegError, *BROKEN_PICTURE) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{film} cannot be read as a video ({shown(str(error))}).") from error


def _shown_size(film: str, source: Source) -> tuple[int, int]:
    """Return (width, height) in square pixels, before the film is turned."""
    with open_film(source) as container:
        stream = film_stream(container)
        if stream is None:
            raise MediaError(f"{film} holds no video stream.")
        # A stream of an unknown codec has no width and no height.
        width, height = getattr(stream, "width", 0), getattr(stream, "height", 0)
        if not 0 < width * height <= MOST_FRAME_PIXELS:
            raise MediaError(f"{film}: frames of {width} x {height} pixels, or of an unknown codec, are not read.")
        ratio = float(stream.sample_aspect_ratio or 1)
    if 1 / MOST_SQUEEZED <= ratio <= MOST_SQUEEZED:
        width = max(1, round(width * ratio))
    require_shape(film, (width, height))
    return width, height


def _sample(
    film: str,
    reader: FrameReader,
    timeline: Timeline,
    size: tuple[int, int],
    frames: Frames,
    window: tuple[float, float],
) -> Video:
    if timeline.lost and not len(timeline.times_s):
        raise MediaError(f"{film}: no frame of it could be decoded.")
    part = _part(film, timeline, *window)
    inside = timeline.times_s[part.numbers.start : part.numbers.stop]
    picked = pick_moments(film, inside, part.end_s - part.start_s, size, frames)
    size = frame_size(*size, len(picked), frames)
    found, times, turn = [], [], None
    for time, frame in reader.read([part.numbers[number] for number in picked]):
        turn = _turn_of(frame) if turn is None else turn
        found.append(_turned(frame.to_ndarray(width=size[0], height=size[1], format="rgb24"), turn))
        times.append(max(0.0, time - part.start_s))
    if reader.lost:
        log.warning("%s is damaged: %d of its frames could not be decoded and are left out", film, reader.lost)
    if not found:
        raise MediaError(f"{film}: no frame of it could be decoded.")
    return Video(np.stack(found), tuple(times), part.end_s - part.start_s)


def _part(film: str, timeline: Timeline, start_s: float, duration_s: float) -> _Part:
    """Find the frames in a window of the film."""
    times = timeline.times_s
    low = timeline.origin_s + start_s
    high = low + duration_s if duration_s else float("inf")
    first, last = (bisect_left(times, edge - _SAME_S) for edge in (low if start_s else -float("inf"), high))
    # A picture that began long before the window may still be on the screen when the window begins.
    until = float(times[first]) if first < len(times) else timeline.end_s
    usual = (timeline.end_s - float(times[0])) / len(times) if len(times) else 0.0
    waits = until - low > min(usual, _SHORT_S) + _SAME_S
    still = first > 0 and low < timeline.end_s and (waits or first >= last)
    numbers = range(first - still, last)
    if not numbers:
        where = f" between {start_s:g} and {start_s + duration_s if duration_s else float('inf'):g} s"
        raise MediaError(f"{film} holds no frame{where if len(times) else ''}.")
    end = float(times[last]) if last < len(times) else timeline.end_s
    return _Part(numbers, low if still else until, min(end, high))


def pick_moments(name: str, times_s: np.ndarray, duration_s: float, size: tuple[int, int], frames: Frames) -> list[int]:
    """Pick the frames nearest to moments that are spread evenly from the first to the last; return their indices.

    If the frame rate varies, one frame may be nearest to several moments. Then fewer are picked, but at least
    MIN_FRAMES if the film has them, and an even number if possible.

    Args:
        times_s: (N,) the times of all frames, rising.
    """
    count = _how_many(name, len(times_s), duration_s, size, frames)
    moments = np.linspace(times_s[0], times_s[-1], count)
    # Rounded, so that rounding errors do not decide between two frames that are equally near.
    nearest = np.interp(moments, times_s, np.arange(len(times_s))).round(6).round().astype(int)
    picked = sorted(set(nearest.tolist()))
    # Four moments or more pick at least three different frames, so one more makes MIN_FRAMES.
    while len(picked) % 2 and len(picked) < count:
        picked = sorted([*picked, _between(picked, times_s)])
    return picked


def _between(picked: Sequence[int], times_s: np.ndarray) -> int:
    """Pick one more frame, near the middle of the longest gap that still has frames in it."""
    gaps = [(left, right) for left, right in pairwise(picked) if right - left > 1]
    left, right = max(gaps, key=lambda gap: float(times_s[gap[1]] - times_s[gap[0]]))
    middle = bisect_left(times_s, (times_s[left] + times_s[right]) / 2)
    return min(max(middle, left + 1), right - 1)


def pick_frames(name: str, total: int, duration_s: float, size: tuple[int, int], frames: Frames) -> list[int]:
    """Pick frames of a constant rate, spread evenly from the first to the last; return their indices."""
    count = _how_many(name, total, duration_s, size, frames)
    return [round(i) for i in np.linspace(0, total - 1, count)]


def _how_many(name: str, total: int, duration_s: float, size: tuple[int, int], frames: Frames) -> int:
    """Return how many frames to keep, an even number if possible.

    Qwen joins frames in pairs, so an odd number would only repeat the last one. If frames of the smallest size would
    still have too many tokens, fewer are kept, with a line in the log.
    """
    # Rounded first, because the same film may be a millionth of a second longer in another container.
    wanted = max(round(round(duration_s * frames.sample_fps, 4) / 2) * 2, MIN_FRAMES)
    wanted = min(wanted, _even(frames.max_frames), _even(total))
    smallest = min(SMALLEST_FRAME_PIXELS, frames.max_frame_pixels, size[0] * size[1])
    count = min(wanted, max(2, _even(frames.max_video_tokens * 2 * TOKEN_PIXELS // smallest)))
    if count < wanted:
        log.warning("%s: %d frames instead of %d, for at most %d tokens", name, count, wanted, frames.max_video_tokens)
    return count


def _even(count: int) -> int:
    """Round down to an even number; 1 stays 1."""
    return count - count % 2 or count


def frame_size(width: int, height: int, count: int, frames: Frames) -> tuple[int, int]:
    """Return the (width, height) at which each frame, and all of them together, keep within the pixel budget."""
    budget = min(frames.max_frame_pixels, frames.max_video_tokens * 2 * TOKEN_PIXELS / count)
    scale = min(1.0, (budget / (width * height)) ** 0.5)
    scale = max(scale, SMALLEST_FRAME_SIDE / min(width, height))
    return max(2, round(width * scale)), max(2, round(height * scale))


def _turn_of(frame: Any) -> tuple[bool, bool, bool]:
    """Tell if a player transposes the frame, then mirrors it left to right, then turns it upside down.

    An angle between quarter turns counts as the nearest one.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # This version of PyAV does not know every kind of data that its FFmpeg attaches to frames.
        return _TURNS[round(frame.rotation / 90) % 4]
    if matrix is None:
        return _TURNS[0]
    # Row by row: a b u, c d v, x y w. A point (x, y) goes to (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    return (True, c < 0, b < 0) if transposed else (False, a < 0, d < 0)


# By quarter turns against the clock.
_TURNS = ((False, False, False), (True, False, True), (False, True, True), (True, True, False))


def _turned(pixels: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """Transpose and mirror a frame: (H, W, 3) -> (H, W, 3), or (W, H, 3) if transposed."""
    transposed, mirrored, upside_down = turn
    if transposed:
        pixels = pixels.transpose(1, 0, 2)
    if mirrored:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if upside_down else pixels
