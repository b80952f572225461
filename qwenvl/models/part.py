"""A file on its way to disk: it can stop at any byte and go on later, and it knows its hash. And who may write there.

Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..log import log

_READ = 1 << 20
_LOOK_S = 0.1
# What a disk answers that knows no locks, as some network disks do.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


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


class FileLock:
    """A file that one process or thread holds at a time, and that is gone when nobody does.

    The system itself lets go of it when a process ends, however it ends, and on a network disk for all machines whose
    systems lock there. So none is ever taken from somebody who is only slow.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number: int | None = None

    def take(self) -> bool:
        """Whether it is held now; at once in either case. OSError where it cannot be made."""
        while self._number is None:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            taken = False
            try:
                if not self._try(number):
                    return False
                # Whoever held it has deleted it while we waited: another one may have made a new one.
                taken = self._is_there(number)
            finally:
                if not taken:
                    os.close(number)
            if taken:
                self._number = number
        return True

    def wait(self, tell: Callable[[], object]) -> None:
        """Until it is held.

        Args:
            tell: called once if somebody else holds it now.
        """
        told = False
        while not self.take():
            if not told:
                tell()
            told = True
            time.sleep(_LOOK_S)

    def is_held(self) -> bool:
        """Whether anybody holds it. Makes no file, and opens none where there is none."""
        if not os.path.lexists(self.path):
            return False
        try:
            number = os.open(self.path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            return False
        try:
            return not self._try(number)
        finally:
            os.close(number)

    def release(self) -> None:
        """It is free, and the file is gone; if it is not held, nothing happens."""
        if self._number is None:
            return
        number, self._number = self._number, None
        if os.name == "nt":  # which deletes no file that is open
            os.close(number)
        with suppress(OSError):
            self.path.unlink()
        if os.name != "nt":
            os.close(number)

    def _try(self, number: int) -> bool:
        try:
            _lock(number)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                return False
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("the disk of %s knows no locks: let nothing else write there meanwhile", self.path.parent)
        return True

    def _is_there(self, number: int) -> bool:
        try:
            return os.path.samestat(os.fstat(number), self.path.stat())
        except FileNotFoundError:
            return False


def _lock(number: int) -> None:
    """Lock an open file, or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
