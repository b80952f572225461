"""Receives what an engine sends: decompressed in bounded steps, cut to a length, read as JSON.

Standard library only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

# Most bytes that are read of a response that is not a stream, and most characters of an error in a stream.
LONGEST_WORDS = 1 << 16
# Bytes that are decompressed at a time, because a few bytes of gzip may hold gigabytes.
_STEP = 1 << 16
# Window sizes for zlib: one that recognises gzip and zlib by their headers, and one for deflate without a header.
_WITH_BEGINNING, _BARE = zlib.MAX_WBITS | 32, -zlib.MAX_WBITS
# Most digits of whole and of other numbers. Longer ones are not counts or times, and slow to read.
_LONGEST_WHOLE, _LONGEST_NUMBER = 18, 400


class UnreadableError(ValueError):
    """A response is compressed in a way that was not asked for, or is broken."""


async def unpacked(blocks: AsyncIterable[bytes], encoding: str) -> AsyncIterator[bytes]:
    """Decompress the blocks of a response, in pieces of bounded size.

    Engines are asked not to compress, but a web server on the way may do so all the same.

    Args:
        encoding: the header Content-Encoding.

    Raises:
        UnreadableError: the compression is another one, or the data is broken.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        async for block in blocks:
            yield block
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise UnreadableError(f"it is packed as {encoding[:40]!r}, which was not asked for")
    unpacker: Any = None
    async for block in blocks:
        if unpacker is None and block:
            # A zlib header has 8 in the low half of its first byte.
            bare = encoding == "deflate" and block[0] & 0x0F != 8
            unpacker = zlib.decompressobj(_BARE if bare else _WITH_BEGINNING)
        while not unpacker.eof:
            step = _unpack(unpacker, block)
            if step:
                yield step
            block = unpacker.unconsumed_tail
            # After a full step there may be more output, although all input has been read.
            if len(step) < _STEP and not block:
                break


def _unpack(unpacker: Any, block: bytes) -> bytes:
    try:
        unpacked: bytes = unpacker.decompress(block, _STEP)
    except zlib.error:
        raise UnreadableError("it is broken where it is packed") from None
    return unpacked


async def beginning(blocks: AsyncIterable[bytes]) -> str:
    """Return the beginning of a response, at most LONGEST_WORDS bytes, as text."""
    found = b""
    try:
        async for block in blocks:
            found += block[: LONGEST_WORDS - len(found)]
            if len(found) >= LONGEST_WORDS:
                break
    except UnreadableError:
        pass  # what has been read is enough, because the status matters most
    return found.decode(errors="replace")


def read_json(text: str) -> Any:
    """Read a JSON text. Numbers with very many digits become infinite. Pure.

    Raises:
        ValueError: the text is not JSON, or is nested too deep.
    """
    try:
        return json.loads(text, parse_int=_whole, parse_float=_number)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_WHOLE else float("inf")


def _number(digits: str) -> float:
    return float(digits) if len(digits) <= _LONGEST_NUMBER else float("inf")
