"""Makes small films whose frames show their own numbers in black and white bars."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT, BITS = 160, 64, 10
QUIET = {"libx265": {"x265-params": "log-level=0"}}


def bars(number: int) -> np.ndarray:
    """Draw the number's bits from left to right, white for 1: (HEIGHT, WIDTH, 3)."""
    lit = [255 * (number >> bit & 1) for bit in range(BITS)]
    return np.repeat(np.tile(np.array(lit, np.uint8).repeat(WIDTH // BITS), (HEIGHT, 1))[..., None], 3, axis=2)


def number(frame: np.ndarray) -> int:
    """Read the number from bars of any size."""
    middles = [int((bit + 0.5) * frame.shape[1] / BITS) for bit in range(BITS)]
    return sum(1 << bit for bit, middle in enumerate(middles) if frame[:, middle].mean() > 128)


def numbers(video: Any) -> list[int]:
    """Return the numbers of the frames that are shown."""
    return [number(frame) for frame in video.frames]


def write_film(
    path: Path,
    codec: str = "libx264",
    total: int = 90,
    *,
    gop: int = 12,
    b_frames: int = 2,
    rate: int = 25,
    times_ms: Sequence[int] | None = None,
    pixels: str = "yuv420p",
    kind: str | None = None,
    sar: Fraction | None = None,
    broken: Collection[int] = (),
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
) -> Path:
    """Write a film of that many frames.

    Args:
        times_ms: when each frame is shown; None for a constant rate.
        broken: numbers of the packets, in the order of the file, that cannot be decoded.
    """
    unit = Fraction(1, 1000) if times_ms else Fraction(1, rate)
    with av.open(str(path), "w", format=kind, options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={**QUIET.get(codec, {}), **(options or {})})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.time_base = gop, b_frames, unit
        if sar:
            context.sample_aspect_ratio = sar
        results = []
        for i in range(total):
            frame = av.VideoFrame.from_ndarray(bars(i), format="rgb24")
            frame.pts, frame.time_base = (times_ms[i] if times_ms else i), unit
            results += stream.encode(frame)
        for i, packet in enumerate(results + stream.encode()):
            container.mux(_rubbish(packet) if i in broken else packet)
    return path


def _rubbish(packet: Any) -> Any:
    """Return a packet with the same time that cannot be decoded."""
    result = av.Packet(bytes(packet)[:6] + b"\xff" * (packet.size - 6))
    result.pts, result.dts, result.time_base, result.stream = packet.pts, packet.dts, packet.time_base, packet.stream
    result.duration, result.is_keyframe = packet.duration, packet.is_keyframe
    return result


def turn(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Give an MP4 a display matrix: a point (x, y) goes to (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    content[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path
