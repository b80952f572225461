"""A folder that one process at a time writes to: a lock of the system's, or where the disk knows none, a claim.

Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..log import log
from ..process import PROCESS

_WINDOWS = sys.platform == "win32"
_LOOK_S = 0.1
# What a disk answers that knows no locks, as some network disks do.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
# Windows says EACCES.
_IN_USE = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
# A claim is renewed so often, and counts for so long after that, by the clock of the disk's own machine.
RENEWED_S, LASTS_S = 5.0, 60.0
# Of a claim, which may hold anything.
_LONGEST = 4096
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class FileLock:
    """A file that one process or thread holds at a time, and that is gone when nobody does.

    The system itself lets go of it when a process ends, however it ends, and on a network disk for all machines whose
    systems lock there. So none is ever taken from somebody who is only slow. On a disk that knows no locks, a claim
    stands for it, which lasts a minute longer than a process that cannot release it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number: int | None = None
        self._claim = Claim(path.with_name(f"{path.name}.claim"))

    def take(self) -> bool:
        """Whether it is held now; at once in either case. OSError where it cannot be made."""
        while self._number is None and not self._claim.held:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
            taken = False
            try:
                known = self._try(number)
                if known is None:
                    return self._take_claim()
                if not known or self._claim.is_others():
                    return False
                # Whoever held it has deleted it while we waited: another one may have made a new one.
                taken = self._is_there(number)
            finally:
                if not taken:
                    _close(number)
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
        """Whether anybody holds it. Makes no lock, and opens none where there is none."""
        if self._claim.held or self._claim.is_others():
            return True
        if not os.path.lexists(self.path):
            return False
        try:
            number = os.open(self.path, os.O_RDWR | _NO_LINK)
        except OSError:
            return False
        try:
            return self._try(number) is False
        finally:
            _close(number)

    def release(self) -> None:
        """It is free, and the file is gone; if it is not held, nothing happens."""
        self._claim.release()
        if self._number is None:
            return
        number, self._number = self._number, None
        if _WINDOWS:  # which deletes no file that is open
            _close(number)
        with suppress(OSError):
            self.path.unlink()
        if not _WINDOWS:
            _close(number)

    def _try(self, number: int) -> bool | None:
        """Whether the open file is locked now; None where that cannot be had."""
        try:
            _lock(number)
        except OSError as error:
            if error.errno in _IN_USE:
                return False
            if error.errno not in _NO_LOCKS:
                raise
            return None
        return True

    def _take_claim(self) -> bool:
        if PROCESS.is_new("no locks", self.path.parent):
            log.warning("the disk of %s knows no locks: others are kept from it by a file", self.path.parent)
        with suppress(OSError):
            self.path.unlink()  # the lock itself, which is none here
        return self._claim.take()

    def _is_there(self, number: int) -> bool:
        try:
            if _WINDOWS:  # where an open file stays, and two looks at one may tell of two disks
                return self.path.exists()
            return os.path.samestat(os.fstat(number), self.path.stat())
        except FileNotFoundError:
            return False


class Claim:
    """A file that says who writes beside it: made only where there is none, renewed all the while.

    Whoever ends without releasing it leaves one that is old after a minute, or at once if it was of this system. How
    old it is, the disk's own clock says, as those of two machines may differ by more. A process that stands still for
    longer than a minute loses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = ""
        self._ended = threading.Event()

    @property
    def held(self) -> bool:
        return bool(self._token)

    def take(self) -> bool:
        """Whether it is held now; at once in either case. OSError where it cannot be made."""
        there = self._read()
        if there is not None and not self._give_way(there):
            return False
        token = secrets.token_hex(16)
        content = json.dumps({"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "token": token})
        try:
            number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(content)
        self._token, self._ended = token, threading.Event()
        threading.Thread(target=self._renew, args=(self._ended,), name="qwenvl-claim", daemon=True).start()
        return True

    def is_others(self) -> bool:
        """Whether somebody else has it, and it is not old. Makes none."""
        there = self._read()
        return there is not None and there.get("token") != self._token and not self._is_old(there)

    def release(self) -> None:
        """It is gone, unless it is another's by now."""
        if not self._token:
            return
        self._ended.set()
        if (self._read() or {}).get("token") == self._token:
            with suppress(OSError):
                self.path.unlink()
        self._token = ""

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(RENEWED_S):
            if (self._read() or {}).get("token") != self._token:
                log.warning("%s was taken by another process, as this one stood still", self.path)
                return
            with suppress(OSError):  # the network may be away for a moment
                os.utime(self.path)

    def _read(self) -> dict[str, Any] | None:
        """What it says; {} where that is nothing, and None where there is none."""
        if not os.path.lexists(self.path):
            return None
        try:
            number = os.open(self.path, os.O_RDONLY | _NO_LINK)
        except FileNotFoundError:
            return None
        except OSError:  # a link, a folder
            return {}
        try:
            said = json.loads(os.read(number, _LONGEST))
        except (OSError, ValueError, RecursionError):  # a folder, a claim that is being written
            return {}
        finally:
            os.close(number)
        return said if isinstance(said, dict) else {}

    def _is_old(self, there: dict[str, Any]) -> bool:
        """Whether its holder has ended."""
        if _machine() and there.get("machine") == _machine() and not _is_alive(there.get("pid")):
            return True
        try:
            return self._now() - self.path.lstat().st_mtime > LASTS_S
        except OSError:
            return False

    def _now(self) -> float:
        """By the clock of the machine that has the disk: what it writes on a new file."""
        probe = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        number = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
        try:
            return os.fstat(number).st_mtime
        finally:
            os.close(number)
            probe.unlink()

    def _give_way(self, there: dict[str, Any]) -> bool:
        """Whether an old one is out of the way. Of several who try, it is out of the way of one."""
        if not self._is_old(there):
            return False
        aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        try:
            self.path.rename(aside)
        except OSError:
            return False
        moved = Claim(aside)._read()
        if moved == there:
            with suppress(OSError):
                aside.unlink()
            return True
        # Somebody else was faster, and this is a new one.
        with suppress(OSError):
            os.link(aside, self.path)
        with suppress(OSError):
            aside.unlink()
        return False


def _machine() -> str:
    """Where numbers of processes mean the same: a running Linux, or a container of it. "" where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except (OSError, ValueError):
        return ""


def _is_alive(pid: Any) -> bool:
    """Whether a process of this machine has that number; True where that cannot be told."""
    if os.name == "nt" or type(pid) is not int or not 0 < pid < 1 << 31:
        return True  # there, a signal ends the process
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _lock(number: int) -> None:
    """Lock an open file, or raise OSError at once."""
    if _WINDOWS:
        _first_byte(number, "LK_NBLCK")
    else:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _close(number: int) -> None:
    """Close a file that may be locked. Windows unlocks it by itself, but not at once."""
    if _WINDOWS:
        with suppress(OSError):  # it is not locked
            _first_byte(number, "LK_UNLCK")
    os.close(number)


def _first_byte(number: int, how: str) -> None:
    """Windows locks bytes from where the file stands, whether they are there or not."""
    import msvcrt

    system: Any = msvcrt
    os.lseek(number, 0, os.SEEK_SET)
    system.locking(number, getattr(system, how), 1)
