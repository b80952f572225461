"""Locks that let one process at a time write to a folder: the system's file locks, or claim files on disks without.

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
# Seconds between two attempts to take a lock.
_LOOK_S = 0.1
# Errors of disks without file locks, as some network disks are.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
# Errors for a locked file; EACCES is that of Windows.
_IN_USE = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
# Seconds between two renewals of a claim, and for how long it is valid after one, by the clock of the disk's machine.
RENEWED_S, LASTS_S = 5.0, 60.0
# Most bytes that are read of a claim file, which other programs may have written.
_LONGEST = 4096
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class FileLock:
    """A file that one process or thread holds at a time, and that is deleted when it is released.

    The system releases it when a process ends, however it ends, and on a network disk for all machines whose systems
    lock there. So it is never taken from a process that is only slow. On a disk without file locks a Claim replaces it,
    which stays for a minute after a process that ends without releasing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number: int | None = None
        self._claim = Claim(path.with_name(f"{path.name}.claim"))

    def take(self) -> bool:
        """Try to take the lock without waiting; True if this object holds it now. OSError if it cannot be created."""
        while self._number is None and not self._claim.held:
            number = os.open(self.path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
            taken = False
            try:
                locked = self._try(number)
                if locked is None:
                    return self._take_claim()
                if not locked or self._claim.is_others():
                    return False
                # The last holder may have deleted the file since it was opened, and another process may hold a new one.
                taken = self._is_at_path(number)
            finally:
                if not taken:
                    _close(number)
            if taken:
                self._number = number
        return True

    def wait(self, on_wait: Callable[[], object]) -> None:
        """Wait until this object holds the lock.

        Args:
            on_wait: called once if another process or thread holds it now.
        """
        called = False
        while not self.take():
            if not called:
                on_wait()
            called = True
            time.sleep(_LOOK_S)

    def is_held(self) -> bool:
        """Return True if any process or thread holds the lock. It creates no file."""
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
        """Release the lock and delete its file; do nothing if this object does not hold it."""
        self._claim.release()
        if self._number is None:
            return
        number, self._number = self._number, None
        if _WINDOWS:  # cannot delete an open file
            _close(number)
        with suppress(OSError):
            self.path.unlink()
        if not _WINDOWS:
            _close(number)

    def _try(self, number: int) -> bool | None:
        """Try to lock the open file; True if it is locked now, False if it is in use, None on a disk without locks."""
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
            log.warning("the disk of %s has no file locks: a claim file keeps other processes away", self.path.parent)
        with suppress(OSError):
            self.path.unlink()  # the lock file, which has no use here
        return self._claim.take()

    def _is_at_path(self, number: int) -> bool:
        try:
            if _WINDOWS:  # an open file stays there, and os.stat() may report another disk than os.fstat()
                return self.path.exists()
            return os.path.samestat(os.fstat(number), self.path.stat())
        except FileNotFoundError:
            return False


class Claim:
    """A file that names the process that writes beside it: created if no other exists, and renewed while it is held.

    A process that ends without releasing its claim leaves one that expires after a minute, or at once if the process
    ran on this system. The age is measured by the disk's own clock, as the clocks of two machines may differ by more.
    A process that is suspended for longer than a minute loses its claim.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = ""
        self._ended = threading.Event()

    @property
    def held(self) -> bool:
        return bool(self._token)

    def take(self) -> bool:
        """Try to take the claim without waiting; True if this object holds it now. OSError if it cannot be created."""
        found = self._read()
        if found is not None and not self._give_way(found):
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
        """Return True if another process or object holds a claim that has not expired. It creates no claim."""
        found = self._read()
        return found is not None and found.get("token") != self._token and not self._is_old(found)

    def release(self) -> None:
        """Delete the claim, unless another process has taken it by now."""
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
                log.warning("%s was taken by another process, because this one did not renew it in time", self.path)
                return
            with suppress(OSError):  # the network may be away for a moment
                os.utime(self.path)

    def _read(self) -> dict[str, Any] | None:
        """Return the content of the claim file; {} if it is not valid, None if the file does not exist."""
        if not os.path.lexists(self.path):
            return None
        try:
            number = os.open(self.path, os.O_RDONLY | _NO_LINK)
        except FileNotFoundError:
            return None
        except OSError:  # a link, a folder
            return {}
        try:
            content = json.loads(os.read(number, _LONGEST))
        except (OSError, ValueError, RecursionError):  # a folder, a claim that is being written
            return {}
        finally:
            os.close(number)
        return content if isinstance(content, dict) else {}

    def _is_old(self, found: dict[str, Any]) -> bool:
        """Return True if the claim's process has ended, or did not renew it for LASTS_S."""
        if _machine() and found.get("machine") == _machine() and not _is_alive(found.get("pid")):
            return True
        try:
            return self._now() - self.path.lstat().st_mtime > LASTS_S
        except OSError:
            return False

    def _now(self) -> float:
        """Return the time by the clock of the machine that has the disk, from the time of a new file."""
        probe = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        number = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
        try:
            return os.fstat(number).st_mtime
        finally:
            os.close(number)
            probe.unlink()

    def _give_way(self, found: dict[str, Any]) -> bool:
        """Remove an expired claim; True if this call removed it. Of several processes that try, one succeeds."""
        if not self._is_old(found):
            return False
        aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        try:
            self.path.rename(aside)
        except OSError:
            return False
        moved = Claim(aside)._read()
        if moved == found:
            with suppress(OSError):
                aside.unlink()
            return True
        # Another process was faster, and this is its new claim: put it back.
        with suppress(OSError):
            os.link(aside, self.path)
        with suppress(OSError):
            aside.unlink()
        return False


def _machine() -> str:
    """Return a name of the running Linux, or container of it, within which a process id is unique; "" if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except (OSError, ValueError):
        return ""


def _is_alive(pid: Any) -> bool:
    """Return True if a process of this machine has that id, or if that cannot be found out."""
    if os.name == "nt" or type(pid) is not int or not 0 < pid < 1 << 31:
        return True  # on Windows, os.kill() would end the process
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _lock(number: int) -> None:
    """Lock an open file without waiting; OSError if another process or thread has locked it."""
    if _WINDOWS:
        _first_byte(number, "LK_NBLCK")
    else:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _close(number: int) -> None:
    """Close a file that may be locked. Windows unlocks it by itself, but not at once."""
    if _WINDOWS:
        with suppress(OSError):  # raised if it is not locked
            _first_byte(number, "LK_UNLCK")
    os.close(number)


def _first_byte(number: int, how: str) -> None:
    """Lock or unlock the first byte, which need not exist. Windows locks bytes from the file's position on."""
    import msvcrt

    system: Any = msvcrt
    os.lseek(number, 0, os.SEEK_SET)
    system.locking(number, getattr(system, how), 1)
