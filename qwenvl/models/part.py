"""A file on its way to disk: it can stop at any byte and go on later, and it knows its hash. Which files have arrived.

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
# Called with a number of bytes.
Count = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. Its hash is SHA-256 if it is large, and git's SHA-1 if it lies in git."""

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
        """Named by the hash too: what came of another revision of the file is of no use."""
        return folder / f"{self.name}.{self.hash[:12]}.part"

    def may_be(self, path: Path) -> bool:
        """Tell by its size whether a file can be this one."""
        return path.is_file() and path.stat().st_size == self.size

    def equals(self, path: Path, read: Count) -> bool:
        """Compare with a file on disk, all of which is read if it has the right size.

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
    """The files of a folder that have arrived, by hash. They are noted in a file: an hour's work to find out anew.

    Args:
        marker: that file. It is there as long as some are missing.
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
        """Tell whether it has arrived. One that somebody else put there is read."""
        if self._is_noted(file):
            return file.may_be(self._folder / file.name)
        if not file.equals(self._folder / file.name, read):
            return False
        self.note(file)
        return True

    def note(self, file: RemoteFile) -> None:
        """Keep in mind that it has arrived."""
        with self._lock:
            self._hashes[file.name] = file.hash
            self._write()

    def _is_noted(self, file: RemoteFile) -> bool:
        return self._hashes.get(file.name) == file.hash

    def _write(self) -> None:
        self._marker.write_text(json.dumps(self._hashes), encoding="utf-8")


class Part:
    """As much of a file as has come: it begins with what an earlier try left, and huggingface_hub writes into it.

    Args:
        tell: called with the number of bytes of every write; negative where they turned out useless.
        read: called with the number of bytes of an earlier try that were read now, so that they count.
    """

    def __init__(self, file: RemoteFile, folder: Path, tell: Count, read: Count = lambda _: None) -> None:
        self.path = file.part_path(folder)
        self._remote = file
        self._tell = tell
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
        self._tell(len(data))
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def truncate(self) -> None:
        """After seek: for a server that sends from the start although asked for the rest."""
        self._file.truncate()
        before = self.size
        self._begin()
        self._tell(-before)

    def close(self) -> None:
        self._file.close()

    def why_wrong(self) -> str | None:
        """The reason why this is not the whole file, or None."""
        if self.size != self._remote.size:
            return f"it has {self.size} bytes instead of {self._remote.size}"
        if self._hasher.hexdigest() != self._remote.hash:
            return f"its hash is {self._hasher.hexdigest()[:12]}... instead of {self._remote.hash[:12]}..."
        return None

    def _begin(self) -> None:
        """Hash what is there, and stand at its end."""
        self._hasher = self._remote.hasher()
        self.size = self._file.seek(0)
        while data := self._file.read(_READ):
            self._hasher.update(data)
            self.size += len(data)
            self._read(len(data))
