"""What an engine sends, before anything looks at it: unpacked in bounded steps, cut to a length, read as JSON.

Standard library only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

# Of a response that is no stream, so many bytes are read, and of an error within a stream so many characters.
LONGEST_WORDS = 1 << 16
# A few bytes of gzip may hold gigabytes: so many are unpacked at a time.
_STEP = 1 << 16
# What zlib takes: gzip and zlib by their beginnings, and deflate without one.
_WITH_BEGINNING, _BARE = zlib.MAX_WBITS | 32, -zlib.MAX_WBITS
# Longer numbers are no counts and no times; reading them takes more than their length.
_LONGEST_WHOLE, _LONGEST_NUMBER = 18, 400


class UnreadableError(ValueError):
    """A response is packed in a way that was not asked for, or is not what it says."""


async def unpacked(blocks: AsyncIterable[bytes], encoding: str) -> AsyncIterator[bytes]:
    """The blocks of a response as they were before the engine packed them, in pieces of bounded size.

    Engines are asked not to pack. Some web server on the way may do so all the same.

    Args:
        encoding: the header Content-Encoding.

    Raises:
        UnreadableError: they are packed otherwise, or broken.
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
            # A beginning of zlib's own says 8 in its low half.
            bare = encoding == "deflate" and block[0] & 0x0F != 8
            unpacker = zlib.decompressobj(_BARE if bare else _WITH_BEGINNING)
        while not unpacker.eof:
            step = _unpack(unpacker, block)
            if step:
                yield step
            block = unpacker.unconsumed_tail
            # A step that is full may have left more behind, though all was taken in.
            if len(step) < _STEP and not block:
                break


def _unpack(unpacker: Any, block: bytes) -> bytes:
    try:
        unpacked: bytes = unpacker.decompress(block, _STEP)
    except zlib.error:
        raise UnreadableError("it is broken where it is packed") from None
    return unpacked


async def beginning(blocks: AsyncIterable[bytes]) -> str:
    """As much of a response as anybody will read, and no more."""
    found = b""
    try:
        async for block in blocks:
            found += block[: LONGEST_WORDS - len(found)]
            if len(found) >= LONGEST_WORDS:
                break
    except UnreadableError:
        pass  # the status says the most of it
    return found.decode(errors="replace")


def read_json(text: str) -> Any:
    """What a JSON text holds. Numbers with more digits than anybody counts to become infinite. Pure.

    Raises:
        ValueError: it is none, or nested deeper than anybody follows.
    """
    try:
        return json.loads(text, parse_int=_whole, parse_float=_number)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_WHOLE else float("inf")


def _number(digits: str) -> float:
    return float(digits) if len(digits) <= _LONGEST_NUMBER else float("inf")
