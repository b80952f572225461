"""Files of a download: one that is being written, which can stop at any byte and go on later, and those in place.

Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.bounded_json import UnreadableError, read_json_object

_READ = 1 << 20
# A function that is called with a number of bytes.
Count = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. A large file has a SHA-256 hash, a file in git itself has git's SHA-1."""

    name: str
    size: int
    sha256: str = ""
    git_sha1: str = ""

    @property
    def hash(self) -> str:
        return self.sha256 or self.git_sha1

    def hasher(self) -> Any:
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def part_path(self, folder: Path) -> Path:
        """Return the path of the unfinished file. It holds the hash, because other revisions' bytes are of no use."""
        return folder / f"{self.name}.{self.hash[:12]}.part"

    def may_be(self, path: Path) -> bool:
        """Tell by its size if a file can be this one."""
        return path.is_file() and path.stat().st_size == self.size

    def equals(self, path: Path, read: Count) -> bool:
        """Compare it with a file on disk, which is read to its end if it has the right size.

        Args:
            read: called with the number of bytes that were read now.
        """
        if not self.may_be(path):
            return False
        hasher = self.hasher()
        with path.open("rb") as there:
            while data := there.read(_READ):
                hasher.update(data)
                read(len(data))
        return hasher.hexdigest() == self.hash


class InPlace:
    """The complete files of a folder and their hashes, noted in a file because hashing them again takes long.

    Args:
        marker: that file. It exists as long as some files are missing.
    """

    def __init__(self, folder: Path, marker: Path) -> None:
        self._folder = folder
        self._marker = marker
        self._lock = threading.Lock()
        try:
            self._hashes: dict[str, str] = read_json_object(marker)
        except UnreadableError:
            self._hashes = {}
        self._write()

    def unknown(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        """Find the files that lie there, by name and size, and were not brought by an earlier run."""
        return [file for file in files if not self._is_noted(file) and file.may_be(self._folder / file.name)]

    def has(self, file: RemoteFile, read: Count) -> bool:
        """Tell if the file is complete. One that was not downloaded here is read to compare its hash."""
        if self._is_noted(file):
            return file.may_be(self._folder / file.name)
        if not file.equals(self._folder / file.name, read):
            return False
        self.note(file)
        return True

    def note(self, file: RemoteFile) -> None:
        """Note that the file is complete."""
        with self._lock:
            self._hashes[file.name] = file.hash
            self._write()

    def _is_noted(self, file: RemoteFile) -> bool:
        return self._hashes.get(file.name) == file.hash

    def _write(self) -> None:
        self._marker.write_text(json.dumps(self._hashes), encoding="utf-8")


class Part:
    """An unfinished file, into which huggingface_hub writes. It begins with the bytes of an earlier try.

    Args:
        written: called with the number of bytes of every write; negative if bytes have to be dropped.
        read: called with the number of bytes of an earlier try that were read now, so that they count.
    """

    def __init__(self, file: RemoteFile, folder: Path, written: Count, read: Count = lambda _: None) -> None:
        self.path = file.part_path(folder)
        self._remote = file
        self._written = written
        self._read = read
        # Unbuffered, so that being killed loses nothing.
        self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        self._begin()

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._hasher.update(data)
        self.size += len(data)
        self._written(len(data))
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def truncate(self) -> None:
        """Drop what follows the position. Used when a server sends the whole file although asked for the rest."""
        self._file.truncate()
        before = self.size
        self._begin()
        self._written(-before)

    def close(self) -> None:
        self._file.close()

    def why_wrong(self) -> str | None:
        """Return why this is not the complete file, or None."""
        if self.size != self._remote.size:
            return f"it has {self.size} bytes instead of {self._remote.size}"
        if self._hasher.hexdigest() != self._remote.hash:
            return f"its hash is {self._hasher.hexdigest()[:12]}... instead of {self._remote.hash[:12]}..."
        return None

    def _begin(self) -> None:
        """Hash the bytes that are there, and go to their end."""
        self._hasher = self._remote.hasher()
        self.size = self._file.seek(0)
        while data := self._file.read(_READ):
            self._hasher.update(data)
            self.size += len(data)
            self._read(len(data))
