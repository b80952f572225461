"""A folder that one process at a time writes to: a lock of the system's, or where the disk knows none, a claim.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..log import log

_LOOK_S = 0.1
# What a disk answers that knows no locks, as some network disks do.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


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
