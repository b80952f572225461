"""Opens files of pictures and films: kinds that hold nothing but that, so that a file never opens another one."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

from PIL import Image

# Pillow knows many more, among them EPS, for which it starts Ghostscript on whatever the file says.
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# What Pillow raises about files that are damaged, kind by kind: from a PNG it may be a SyntaxError, from an AVIF a
# RuntimeError.
BROKEN_PICTURE = (
    *(OSError, Image.DecompressionBombError, SyntaxError, RuntimeError, ValueError, TypeError),
    *(LookupError, ArithmeticError, EOFError, struct.error),
)
# As FFmpeg calls them. Playlists, manifests and numbered pictures name other files and addresses, which it would open.
FILMS = (
    *("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "gif", "apng", "mxf"),
    *("nut", "h264", "hevc", "vvc", "obu", "ivf", "m4v", "mjpeg", "vc1", "yuv4mpegpipe", "dv", "rm", "wtv"),
)

# Qwen's processors take no longer ones, and say so in words that name no input.
MOST_NARROW = 200


class MediaError(ValueError):
    """A picture or a video cannot be used."""


def require_shape(name: str, size: tuple[int, int]) -> None:
    """Raise MediaError if a picture or frame of (width, height) pixels is too narrow for the models."""
    width, height = size
    if max(width, height) > MOST_NARROW * min(width, height):
        raise MediaError(
            f"{name} is {width} x {height} pixels: a picture may be at most {MOST_NARROW} times as long as it is wide."
        )


def open_picture(path: Path) -> Image.Image:
    """The file as Pillow opens it, whatever its name. Raises one of BROKEN_PICTURE."""
    # Of all kinds, because Pillow stumbles over those that its build lacks.
    Image.init()
    return Image.open(path, formats=[kind for kind in PICTURES if kind in Image.OPEN])


def open_film(source: str | io.BytesIO) -> Any:
    """PyAV's container of a file, or of its content. Raises av.FFmpegError or OSError."""
    import av

    # Beside the kinds: should one of them name something all the same, it could be no address.
    only = {"format_whitelist": ",".join(FILMS), "protocol_whitelist": "file"}
    if not isinstance(source, str):
        source.seek(0)
    # The name of a file may look like an address.
    where = f"file:{source}" if isinstance(source, str) else source
    try:
        # Titles are in any encoding.
        # Not as options of the streams too: of a file that names its streams late (FLV), PyAV 14 then crashes.
        return av.open(where, container_options=only, metadata_errors="replace")
    except ValueError as error:
        raise OSError("it is a playlist, a picture, or another kind of file than a film") from error
