"""The one way from a value in a widget to a path: whoever may queue prompts may not read or write everything.

Standard library only. Which folders may be reached is for the caller to say.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

from .settings import shown

ALLOWED = "ComfyUI's input, output, temp or user folder"
# Two letters at least: one is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_DEVICE_FOLDERS = tuple(Path(name) for name in ("/dev", "/proc", "/sys"))
# In characters, and in bytes: what Linux takes.
_LONGEST, _LONGEST_NAME = 3000, 255
# Files in memory, an ordinary place for large data.
_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108


class ForbiddenPathError(ValueError):
    """A path that a widget may not name."""


def resolve(name: str, value: str, roots: Sequence[Path] | None, bases: Sequence[Path]) -> Path:
    """The real path that a widget's value stands for: absolute, without links. It need not exist.

    Args:
        name: the widget, for the error.
        roots: folders that may be reached, with all that is in them; None for any local path.
        bases: what a relative path starts from, best first: where it exists, else the first one allowed.

    Raises:
        ForbiddenPathError: it is empty, no local path, or not below a root. What lies elsewhere gets the same message
            whether it exists or not.
    """
    value = value.strip()
    if reason := why_not_local(value, windows=os.name == "nt"):
        raise ForbiddenPathError(f"{name}: {shown(value)} {reason}.")
    if roots is not None and ".." in PurePath(value.replace("\\", "/")).parts:
        raise _outside(name, value)
    given = Path(value)
    if value == "~" or value.startswith(("~/", "~\\")):
        given = given.expanduser()
    # An absolute path replaces the base that it is joined to.
    found = [real for base in bases if (real := _real(base / given)) and is_within(real, roots)]
    if not found:
        raise _outside(name, value) if roots is not None else _circle(name, value)
    best = next((path for path in found if _mode(path)), found[0])
    if _is_device(best):
        raise ForbiddenPathError(f"{name}: {value!r} is a device, a pipe or a socket. Give a file or a folder.")
    return best


def is_within(path: Path, roots: Sequence[Path] | None) -> bool:
    """Whether the path, links followed, is below one of the roots, or is one."""
    if roots is None:
        return True
    real = _real(path)
    return real is not None and any(real.is_relative_to(root.resolve()) for root in roots)


def why_not_local(value: str, *, windows: bool) -> str | None:
    """Why the text cannot be a path on a disk of this machine, or None. Pure: it looks at no disk and no network."""
    if not value:
        return "is empty: give a path"
    if not _is_text(value):
        return "holds a character that no path can hold"
    if len(value) > _LONGEST or any(len(os.fsencode(part)) > _LONGEST_NAME for part in re.split(r"[\\/]", value)):
        return "is longer than a path can be"
    # Before anything asks Windows about them: a mere look at \\host\share sends the user's credentials there.
    if re.match(r"[\\/]{2}|[\\/]\?\?[\\/]", value):
        return "is a network or device path. Give a local one"
    if _URL.match(value):
        return "is a URL. Give a local path"
    if windows and (":" in value[2:] or any(_DEVICE_NAME.fullmatch(part) for part in re.split(r"[\\/]", value))):
        return "names a device or a stream of Windows. Give a file or a folder"
    return None


def is_plain_name(name: str, *, windows: bool) -> bool:
    """Whether the text is the name of one file, without any folder, drive or device. Pure."""
    kind = PureWindowsPath if windows else PurePosixPath
    if not _is_text(name) or name in ("", ".", "..") or kind(name).name != name:
        return False
    return not windows or (":" not in name and not _DEVICE_NAME.fullmatch(name))


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _real(path: Path) -> Path | None:
    """The path with every link followed; None where links go round in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return None


def _is_device(path: Path) -> bool:
    """Opening one may wait for ever, or do something."""
    in_memory = path.is_relative_to(_MEMORY_FOLDER)
    if not in_memory and any(path.is_relative_to(folder) for folder in _DEVICE_FOLDERS):
        return True
    mode = _mode(path)
    return mode != 0 and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _mode(path: Path) -> int:
    """What the path is, in the bits of stat; 0 where there is nothing to be seen."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _outside(name: str, value: str) -> ForbiddenPathError:
    return ForbiddenPathError(
        f"{name}: {value!r} is not in a folder that may be reached. This ComfyUI listens beyond this machine, so only "
        f"{ALLOWED} can be named, and no path may hold '..'."
    )


def _circle(name: str, value: str) -> ForbiddenPathError:
    return ForbiddenPathError(f"{name}: {value!r} is a link that leads back to itself. Give the file or folder.")


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address. A name other than localhost may mean anything."""
    try:
        return ipaddress.ip_address(address.strip()).is_loopback
    except ValueError:
        return address.strip() == "localhost"
