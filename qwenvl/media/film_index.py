"""Counts the packets that the index of an MP4 or QuickTime film claims, before FFmpeg builds that index.

A few bytes may claim any number of packets. FFmpeg keeps 40 bytes for each, and building its index cannot be cancelled.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .packets import MOST_PACKETS, Check, TooManyPacketsError

# Boxes that hold other boxes, at any depth.
_HOLDS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf"}
# Boxes of pictures, sound or tables, in which FFmpeg looks for no other boxes.
_PASSED = {b"mdat", b"skip", b"wide", b"stco", b"co64", b"ctts", b"stts", b"stss", b"stsc", b"stps", b"sdtp", b"mfra"}
# Boxes in which FFmpeg looks for an index if it has found none elsewhere.
_HIDES = {b"free", b"hoov"}
# Table -> offset of the number of samples, in bytes after the table's name.
_COUNTS = {b"stsz": 8, b"stz2": 8, b"trun": 4}
# FFmpeg may keep the samples once more for every part of an edit list; the first part is often empty.
_EDITS, _EDITS_AT = b"elst", 4
_PACKED = b"cmov"
_TABLES = (*_COUNTS, _EDITS, _PACKED)
_MOST_BOXES, _DEEPEST = 1 << 20, 12
_BLOCK, _HEAD = 1 << 20, 16


def require_small_index(source: str | io.BytesIO, check: Check) -> None:
    """Raise TooManyPacketsError if a film's index claims more samples than MOST_PACKETS, or hides their number.

    Args:
        check: called again and again; raises to cancel.
    """
    with _opened(source) as file:
        end = file.seek(0, io.SEEK_END)
        walk = _Walk(file, check)
        walk.boxes(0, end, 0)
    if walk.samples * max(1, walk.edits - 1) > MOST_PACKETS * (2 if walk.edits > 1 else 1):
        raise TooManyPacketsError(
            f"its index claims {walk.samples:,} packets of pictures and sound in {max(1, walk.edits):,} parts, and at "
            f"most {MOST_PACKETS:,} are read: cut it into shorter films"
        )


@contextmanager
def _opened(source: str | io.BytesIO) -> Iterator[BinaryIO]:
    if isinstance(source, str):
        with Path(source).open("rb") as file:
            yield file
    else:
        yield source


class _Walk:
    """Goes through the boxes of a file and adds up the samples that their tables claim."""

    def __init__(self, file: BinaryIO, check: Check) -> None:
        self._file, self._check = file, check
        self._seen = 0
        self.samples = self.edits = 0

    def boxes(self, at: int, end: int, depth: int) -> None:
        """Go through the boxes between two offsets of the file. Return early in a file of another kind."""
        while at + 8 <= end:
            self._check()
            self._seen += 1
            if self._seen > _MOST_BOXES:
                raise TooManyPacketsError(f"it is cut into more than {_MOST_BOXES:,} boxes, as no film is")
            head = self._read(at, _HEAD)
            size, kind, begin = int.from_bytes(head[:4], "big"), head[4:8], at + 8
            if not kind.isalnum() and not kind.strip().isalnum() and not depth:
                return
            if size == 1:
                size, begin = int.from_bytes(head[8:], "big"), at + 16
            ends = end if size == 0 else min(end, at + size)
            if ends < begin:
                return
            self._box(kind, begin, ends, depth)
            at = ends

    def _box(self, kind: bytes, begin: int, end: int, depth: int) -> None:
        hides = kind in _HIDES and self._read(begin + 4, 4) in (b"mvhd", _PACKED)
        if (kind in _HOLDS or hides) and depth < _DEEPEST:
            self.boxes(begin, end, depth + 1)
        elif kind in _TABLES:
            self._table(kind, self._read(begin, _HEAD))
        elif kind not in _PASSED and kind not in _HIDES and depth:
            self._search(begin, end)

    def _search(self, at: int, end: int) -> None:
        """Count whatever looks like a table in a box of an unknown kind, which may hold tables in its own layout."""
        while at < end:
            self._check()
            block = self._read(at, min(_BLOCK + _HEAD, end - at))
            for kind in _TABLES:
                found = block.find(kind)
                while 0 <= found < _BLOCK:
                    size = int.from_bytes(block[max(0, found - 4) : found], "big")
                    if found >= 4 and 8 <= size <= end - at - found + 4:
                        self._table(kind, block[found + 4 : found + 4 + _HEAD])
                    found = block.find(kind, found + 1)
            at += _BLOCK

    def _table(self, kind: bytes, content: bytes) -> None:
        if kind == _PACKED:
            raise TooManyPacketsError("its index is packed (cmov), as no program has done for long: save it anew")
        at = _COUNTS.get(kind, _EDITS_AT)
        count = int.from_bytes(content[at : at + 4], "big")
        if kind == _EDITS:
            self.edits = max(self.edits, count)
        else:
            self.samples += count

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)
