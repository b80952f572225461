"""Makes Linux refuse flock to a process (seccomp), as network disks without locks do."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
import sys

# Numbers of the system call, by machine.
_FLOCK = {"x86_64": 73, "aarch64": 32}
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def is_possible() -> bool:
    return sys.platform == "linux" and platform.machine() in _FLOCK


def without_locks() -> None:
    """Make flock fail in this process and in those that it starts, as on a disk without locks."""
    steps = [
        (_LOAD, 0, 0, 0),
        (_EQUALS, 0, 1, _FLOCK[platform.machine()]),
        (_RETURN, 0, 0, _ERRNO | errno.ENOLCK),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    program = Program(len(steps), ctypes.addressof(code))
    system = ctypes.CDLL(None, use_errno=True)
    for call in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)):
        if system.prctl(*call):
            raise OSError(ctypes.get_errno(), "seccomp is not to be had")
