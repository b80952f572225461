"""A file on its way to disk: it can stop at any byte and go on later, and it knows its hash.

Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_READ = 1 << 20


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

    def equals(self, path: Path) -> bool:
        """Whether that is what lies on disk. Reads all of it."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        hasher = self.hasher()
        with path.open("rb") as there:
            while data := there.read(_READ):
                hasher.update(data)
        return hasher.hexdigest() == self.hash


class Part:
    """As much of a file as has come: it begins with what an earlier try left, and huggingface_hub writes into it.

    Args:
        tell: called with the number of bytes of every write; negative where they turned out useless.
    """

    def __init__(self, file: RemoteFile, folder: Path, tell: Callable[[int], None]) -> None:
        self.path = file.part_path(folder)
        self._remote = file
        self._tell = tell
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
        self._tell(self.size - before)

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
