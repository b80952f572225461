"""Opens files of pictures and films: kinds that hold nothing but that, so that a file never opens another one."""

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

# Pillow knows many more, among them EPS, for which it starts Ghostscript on whatever the file says.
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# A picture that claims more would take gigabytes before it shows that it holds nothing. Pillow's own limit, which is
# the same, is switched off by some programs.
MOST_PIXELS = 178_956_970
# What Pillow raises about files that are damaged, kind by kind: from a PNG it may be a SyntaxError, from an AVIF a
# RuntimeError.
BROKEN_PICTURE = (
    *(OSError, Image.DecompressionBombError, SyntaxError, RuntimeError, ValueError, TypeError),
    *(LookupError, ArithmeticError, EOFError, struct.error),
)
_PNG = b"\x89PNG\r\n\x1a\n"
# Of a PNG's chunks that need not be there, those that change what is seen: transparency, rotation, frames.
_SEEN = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
# Where cameras' programs write the rotation besides, and how long that may be.
_XMP, _LONGEST_XMP = b"XML:com.adobe.xmp\0\0", 1 << 20
# A longer file is no picture whose text would be taken out in memory.
_LONGEST_FILE = 1 << 30
# What Pillow puts where a file holds nothing more, and how far a JPEG's may be from it.
_FILLERS, _ABOUT = (0, 128), 3
# Side of the largest block of a JPEG. The first is made up where there is none.
_BLOCK = 16
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
    """The file as Pillow opens it, whatever its name, without its pixels. Raises one of BROKEN_PICTURE."""
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
    """The file's picture, or the first of its pictures, upright as its camera says.

    Of a damaged file, what ComfyUI shows of it, which the log says.

    Args:
        name: of the input, for the log.

    Raises:
        one of BROKEN_PICTURE: it is no picture, too large, or nothing of it can be seen.
    """
    try:
        with PROCESS.pillow.used():
            return _loaded(name, path)
    except FileNotFoundError:
        raise
    except BROKEN_PICTURE as error:
        return _damaged(name, path, error)


def _open(source: Path | io.BytesIO) -> Image.Image:
    # Of all kinds, because Pillow stumbles over those that its build lacks.
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
    """What can be seen of a file that cannot be read as it is; raises the error where that is nothing."""
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
    """Pillow shows what there is of a damaged file, as for ComfyUI's own loader; none of our other threads reads then.

    It has one switch for that, and no other way.
    """
    with PROCESS.pillow.alone():
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _missing_lines(picture: Image.Image) -> int:
    """How many lines, from the last one upwards, hold nothing but what Pillow fills up with."""
    pixels = np.asarray(picture).astype(np.float32)
    if min(picture.size) > _BLOCK:
        pixels[:_BLOCK, :_BLOCK] = pixels[-1, -1]
    lines = pixels.reshape(len(pixels), -1)[::-1]
    return max(_until(abs(lines - filler).max(axis=1) > _ABOUT) for filler in _FILLERS)


def _until(found: np.ndarray) -> int:
    """How many come before the first that is true."""
    return int(found.argmax()) if found.any() else len(found)


def _without_text(path: Path) -> io.BytesIO | None:
    """A PNG without what is not seen: text, of which Pillow reads so much, and colour profiles. None for others."""
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
    """Whether a chunk of a PNG changes what is seen. Its content is followed by its checksum."""
    if kind == b"iTXt" and chunk.startswith(_XMP) and len(chunk) < _LONGEST_XMP:
        return zlib.crc32(kind + chunk[:-4]) == int.from_bytes(chunk[-4:], "big")
    # A small letter is for what need not be there.
    return not kind[:1].islower() or kind in _SEEN


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
