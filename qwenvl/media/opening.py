"""Opens picture and film files, only of kinds that cannot refer to other files."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from ..checks import shown
from ..log import log
from ..process import PROCESS

# Pillow knows many more, among them EPS, for which it starts Ghostscript on the file.
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# A broken picture that claims more would take gigabytes before it is found to be empty. Pillow has the same limit, but
# some programs switch it off.
MOST_PIXELS = 178_956_970
# What Pillow raises for damaged files. It depends on their kind: a SyntaxError for a PNG, a RuntimeError for an AVIF.
BROKEN_PICTURE = (
    *(OSError, Image.DecompressionBombError, SyntaxError, RuntimeError, ValueError, TypeError),
    *(LookupError, ArithmeticError, EOFError, struct.error),
)
_PNG = b"\x89PNG\r\n\x1a\n"
# Optional chunks of a PNG that change what is seen: transparency, rotation, frames.
_SEEN = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
# The chunk in which photo programs also write the rotation, and how long it may be.
_XMP, _LONGEST_XMP = b"XML:com.adobe.xmp\0\0", 1 << 20
# Text is taken out of a PNG in memory, and not from a file that is larger than this.
_LONGEST_FILE = 1 << 30
# The values with which Pillow fills missing lines, and how far a JPEG's values may be from them.
_FILLERS, _ABOUT = (0, 128), 3
# Side of the largest block of a JPEG, in pixels. Pillow makes up the first block if it is missing.
_BLOCK = 16
# FFmpeg's names. Playlists, manifests and numbered pictures are left out: FFmpeg would open the files they name.
FILMS = (
    *("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "gif", "apng", "mxf"),
    *("nut", "h264", "hevc", "vvc", "obu", "ivf", "m4v", "mjpeg", "vc1", "yuv4mpegpipe", "dv", "rm", "wtv"),
)

# Highest ratio of the sides. Qwen's processors refuse a higher one with an error that does not name the input.
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
    """Open a picture file with Pillow, whatever its name, without reading its pixels. Raises one of BROKEN_PICTURE."""
    try:
        return _open(path)
    except FileNotFoundError:
        raise
    except BROKEN_PICTURE:
        plain = _without_text(path)
        if plain is None:
            raise
        return _open(plain)


def read_picture(name: str, path: Path) -> Image.Image:
    """Read the first picture of a file, turned upright as its camera noted.

    What can be read of a damaged file is shown, as in ComfyUI, with a warning in the log.

    Args:
        name: the input's name, for the log.

    Raises:
        one of BROKEN_PICTURE: the file is not a picture, is too large, or nothing of it can be read.
    """
    try:
        with PROCESS.pillow.used():
            return _loaded(name, path)
    except FileNotFoundError:
        raise
    except BROKEN_PICTURE as error:
        return _damaged(name, path, error)


def _open(source: Path | io.BytesIO) -> Image.Image:
    # Named one by one, because Pillow fails on a name that its build does not have.
    Image.init()
    return Image.open(source, formats=[kind for kind in PICTURES if kind in Image.OPEN])


def _loaded(name: str, source: Path | io.BytesIO) -> Image.Image:
    with _open(source) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"it has {picture.width} x {picture.height} pixels, too many to be read")
        picture.load()
        try:
            ImageOps.exif_transpose(picture, in_place=True)
        except BROKEN_PICTURE as error:
            log.warning("%s: which way it is turned cannot be read (%s): shown as it is", name, shown(str(error)))
    return picture


def _damaged(name: str, path: Path, error: Exception) -> Image.Image:
    """Read what there is of a damaged file; raise `error` if that is nothing."""
    plain, file, why = _without_text(path), str(path), shown(str(error))
    if plain is not None:
        try:
            with PROCESS.pillow.used():
                picture = _loaded(name, plain)
        except BROKEN_PICTURE:
            plain.seek(0)
        else:
            log.warning("%s: text or a colour profile in %r cannot be read (%s): shown without it", name, file, why)
            return picture
    with _forgiving():
        picture = _loaded(name, plain or path)
    missing = _missing_lines(picture)
    if missing == picture.height:
        raise error
    part = f"the last {missing} of its {picture.height} lines are" if missing else "some of it may be"
    log.warning("%s: %r is damaged (%s): %s missing", name, file, why, part)
    return picture


@contextmanager
def _forgiving() -> Iterator[None]:
    """Let Pillow read what there is of a damaged file, as ComfyUI's own loader does.

    Pillow has one switch for that, for the whole process, so none of our other threads reads meanwhile.
    """
    with PROCESS.pillow.alone():
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _missing_lines(picture: Image.Image) -> int:
    """Count the lines, from the last one upwards, that hold nothing but Pillow's filler."""
    pixels = np.asarray(picture).astype(np.float32)
    if min(picture.size) > _BLOCK:
        pixels[:_BLOCK, :_BLOCK] = pixels[-1, -1]
    lines = pixels.reshape(len(pixels), -1)[::-1]
    return max(_until(abs(lines - filler).max(axis=1) > _ABOUT) for filler in _FILLERS)


def _until(found: np.ndarray) -> int:
    """Count the values before the first true one."""
    return int(found.argmax()) if found.any() else len(found)


def _without_text(path: Path) -> io.BytesIO | None:
    """Copy a PNG without text (Pillow limits its length) and colour profiles; None for any other file."""
    try:
        with path.open("rb") as file:
            if file.read(len(_PNG)) != _PNG or path.stat().st_size > _LONGEST_FILE:
                return None
            plain = io.BytesIO()
            plain.write(_PNG)
            while len(head := file.read(8)) == 8:
                (length,), kind = struct.unpack(">I", head[:4]), head[4:]
                chunk = file.read(length + 4)
                if _is_seen(kind, chunk):
                    plain.write(head + chunk)
    except OSError:
        return None
    plain.seek(0)
    return plain


def _is_seen(kind: bytes, chunk: bytes) -> bool:
    """Tell if a chunk of a PNG, its content and checksum, changes what is seen."""
    if kind == b"iTXt" and chunk.startswith(_XMP) and len(chunk) < _LONGEST_XMP:
        return zlib.crc32(kind + chunk[:-4]) == int.from_bytes(chunk[-4:], "big")
    # The name of an optional chunk begins with a small letter.
    return not kind[:1].islower() or kind in _SEEN


def open_film(source: str | io.BytesIO) -> Any:
    """Open a film file, or its content, as PyAV's container. Raises av.FFmpegError or OSError."""
    import av

    # A second lock beside the list of kinds: if a file still refers to something, it cannot be an address.
    only = {"format_whitelist": ",".join(FILMS), "protocol_whitelist": "file"}
    if not isinstance(source, str):
        source.seek(0)
    # The prefix, because the name of a file may look like an address.
    where = f"file:{source}" if isinstance(source, str) else source
    try:
        # Titles may be in any encoding, so errors in them are replaced. container_options and not options, with which
        # PyAV 14 crashes on a file that names its streams late (FLV).
        return av.open(where, container_options=only, metadata_errors="replace")
    except ValueError as error:
        raise OSError("it is a playlist, a picture, or another kind of file than a film") from error
