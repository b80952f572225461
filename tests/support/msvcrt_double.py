"""A double of msvcrt.locking, by Microsoft's description of _locking, on Linux's locks of open file descriptions.

Those are what Windows' are: of bytes from where the file stands, of one handle alone (another one of the same process
is kept out as well), there or not, and gone when the handle is closed or its process ends. It was never run beside the
original.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

LK_UNLCK, LK_LOCK, LK_NBLCK, LK_RLCK, LK_NBRLCK = range(5)
_TRIES, _BETWEEN_S = 10, 1.0


def locking(number: int, mode: int, count: int) -> None:
    """Lock or unlock that many bytes from the current position; raise the OSError that Windows raises."""
    if count < 0 or mode not in range(5):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    if mode == LK_UNLCK:
        if not _set(number, fcntl.F_UNLCK, count):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return
    for tried in range(_TRIES if mode in (LK_LOCK, LK_RLCK) else 1):
        time.sleep(_BETWEEN_S if tried else 0)
        if _set(number, fcntl.F_WRLCK, count):
            return
    told = errno.EDEADLK if mode in (LK_LOCK, LK_RLCK) else errno.EACCES
    raise OSError(told, os.strerror(told))


def _set(number: int, kind: int, count: int) -> bool:
    region = struct.pack("hhqqi4x", kind, os.SEEK_CUR, 0, count, 0)
    try:
        fcntl.fcntl(number, fcntl.F_OFD_SETLK, region)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
