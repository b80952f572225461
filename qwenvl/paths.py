"""Checks of paths in widgets: who can queue a prompt must not be able to read or write every file.

Standard library only. The caller names the folders that may be reached.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

from .checks import shown
from .log import log
from .process import PROCESS

# "auto": any local path while only this machine reaches ComfyUI. "strict": always ComfyUI's own folders only.
SETTING, _CHOICES = "QWENVL_PATHS", ("auto", "strict")
ALLOWED = "ComfyUI's input, output, temp or user folder"
# At least two letters: a single one is a Windows drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
# file:/a, file:///a and file://localhost/a; group 1 is the host.
_FILE_URL = re.compile(r"file:(?://([^/\\]*))?(/.*)", re.IGNORECASE | re.DOTALL)
_THIS_MACHINE = ("", "localhost", "127.0.0.1", "[::1]")
_DRIVE = re.compile(r"[A-Za-z]:")
_QUOTES = ('""', "''", "\u201c\u201d", "\u2018\u2019", "\u201e\u201c", "\u00ab\u00bb", "``")
# Spaces of every width, and invisible characters (direction marks, joiners, byte order mark) that "Copy as path" and
# chat programs add.
_UNSEEN = re.compile(r"[\s\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
# Layers of quotes and marks that are stripped; pasting does not add more than this.
_MOST_LAYERS = 4
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE)
# PROGRA~1 is an alias of a folder, and Windows strips dots and spaces from the end of a name.
_ALIAS = re.compile(r"[^.]{0,6}~[0-9]{1,6}(\.[^.]{0,3})?|.*[^. ][. ]+|\.\.[. ]+")
# The limits of Linux, in bytes. Windows counts characters.
_LONGEST_PATH, _LONGEST_NAME = 4095, 255
_DEVICE_FOLDERS = tuple(Path(name) for name in ("/dev", "/proc", "/sys"))
# The one folder below /dev with ordinary files, in memory.
_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108


class ForbiddenPathError(ValueError):
    """A path that a widget may not name."""


def are_confined(listen: str, cors: object = None) -> bool:
    """Return True if widgets may name ComfyUI's own folders only, as others than this machine's user can queue prompts.

    Args:
        listen: ComfyUI's --listen: addresses, with commas.
        cors: ComfyUI's --enable-cors-header, which lets any page that the user opens queue prompts.
    """
    asked = os.environ.get(SETTING, _CHOICES[0]).strip().lower()
    return _is_strict(asked) or bool(cors) or not all(map(_is_loopback, listen.split(",")))


def _is_strict(asked: str) -> bool:
    """Return True if the setting asks for strict; log an unknown value once, as this runs dozens of times a prompt."""
    if asked not in _CHOICES and PROCESS.is_new(SETTING, asked):
        log.warning("%s is %r, not one of %s: taken as strict", SETTING, asked, ", ".join(_CHOICES))
    return asked != _CHOICES[0]


def _is_loopback(address: str) -> bool:
    """Return True if only this machine can reach the address. A name other than localhost may stand for any address."""
    try:
        return ipaddress.ip_address(address.strip()).is_loopback
    except ValueError:
        return address.strip() == "localhost"


def resolve(name: str, value: str, roots: Sequence[Path] | None, bases: Sequence[Path]) -> Path:
    """Return the real path that a widget's value stands for: absolute, without links. It need not exist.

    Args:
        name: the widget, for the error.
        roots: folders that may be reached, with everything below them; None for any local path.
        bases: folders that a relative path may start from, best first: the first one where it exists is taken, else
            the first one that is allowed.

    Raises:
        ForbiddenPathError: the path is empty, not local, or not below a root. The message does not reveal whether a
            path outside of the roots exists.
    """
    value = unwrapped(value, windows=os.name == "nt")
    if reason := why_not_local(value, windows=os.name == "nt"):
        raise ForbiddenPathError(f"{name}: {shown(value)} {reason}.")
    if roots is not None and is_roundabout(value, windows=os.name == "nt"):
        raise _outside(name, value)
    given = Path(value)
    if given.parts[:1] == ("~",):
        with contextlib.suppress(RuntimeError):  # the user has no home folder
            given = given.expanduser()
    # An absolute path replaces the base that it is joined to.
    found = [path for base in bases if (path := real(base / given)) and is_within(path, roots)]
    if not found:
        raise _outside(name, value) if roots is not None else _circle(name, value)
    best = next((path for path in found if _mode(path)), found[0])
    if _is_device(best):
        raise ForbiddenPathError(f"{name}: {shown(value)} is a device, a pipe or a socket. Give a file or a folder.")
    return best


def unwrapped(value: str, *, windows: bool) -> str:
    """Strip quotes, spaces and invisible marks around a pasted path, and decode a file: URL of this machine. Pure.

    The result is as untrusted as the input: every check still has to follow.
    """
    value = _bare(value, windows)
    url = _FILE_URL.fullmatch(value)
    if url is None:
        return value
    host, path = url[1] or "", unquote(url[2], errors="surrogateescape")
    if windows and _DRIVE.fullmatch(host):
        return host + path  # file://C:/a, as some programs write it
    if host.lower() not in _THIS_MACHINE:
        return value
    if windows and re.match(r"/[A-Za-z][:|](/|$)", path):
        return f"{path[1]}:{path[3:]}"
    return path


def _bare(value: str, windows: bool) -> str:
    for _ in range(_MOST_LAYERS):
        before = value
        value = _trimmed(value)
        if len(value) > 1 and value[0] + value[-1] in _QUOTES:
            value = value[1:-1]
        elif windows:
            value = value.strip('"')  # no file name on Windows holds a quote: cmd turns "a:\b\" into a:\b"
        if value == before:
            break
    return value


def _trimmed(value: str) -> str:
    start, end = 0, len(value)
    while start < end and _UNSEEN.match(value[start]):
        start += 1
    while end > start and _UNSEEN.match(value[end - 1]):
        end -= 1
    return value[start:end]


def pasted(value: str) -> str:
    """Return a path from the command line as it is if it exists, else without quotes, marks and file: around it."""
    try:
        if os.path.lexists(value):
            return value
    except ValueError:
        return value
    return unwrapped(value, windows=os.name == "nt")


def is_within(path: Path, roots: Sequence[Path] | None) -> bool:
    """Return True if the path, links followed, is one of the roots or below one."""
    if roots is None:
        return True
    found = real(path)
    return found is not None and any(found.is_relative_to(root) for root in map(real, roots) if root)


def why_not_local(value: str, *, windows: bool) -> str | None:
    """Explain why the text cannot be a path on this machine's disks; None if it can. Pure: no disk, no network."""
    if not value:
        return "is empty: give a path"
    if not _is_text(value):
        return "holds a character that no path can hold"
    if _is_too_long(value, windows):
        return "is longer than a path can be"
    # Refused before any file operation: on Windows even a stat of \\host\share sends the user's credentials there.
    if re.match(r"[\\/]{2}|[\\/]\?\?[\\/]", value):
        return "is a network or device path. Give a local one"
    if _URL.match(value):
        return "is a URL. Give a local path"
    if windows and (":" in value[2:] or any(_DEVICE_NAME.fullmatch(part) for part in re.split(r"[\\/]", value))):
        return "names a device or a stream of Windows. Give a file or a folder"
    return None


def is_plain_name(name: str, *, windows: bool) -> bool:
    """Return True if the text is the name of one file, without any folder, drive or device. Pure."""
    kind = PureWindowsPath if windows else PurePosixPath
    if not _is_text(name) or name in ("", ".", "..") or kind(name).name != name:
        return False
    return not windows or (":" not in name and not _DEVICE_NAME.fullmatch(name))


def is_roundabout(value: str, *, windows: bool) -> bool:
    """Return True if the path holds ".." or, on Windows, an alias of a name. Pure."""
    parts = PurePath(value.replace("\\", "/")).parts
    return ".." in parts or (windows and any(_ALIAS.fullmatch(part) for part in parts))


def _is_too_long(value: str, windows: bool) -> bool:
    """Return True if a path or a name in it is too long: Python's errors for these differ from a missing file's."""
    text = value if windows else os.fsencode(value).decode("latin-1")
    return len(text) > _LONGEST_PATH or max(map(len, re.split(r"[\\/]" if windows else "/", text))) > _LONGEST_NAME


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def real(path: Path) -> Path | None:
    """Resolve the path with every link followed; None if links form a circle."""
    try:
        found = path.resolve()
        # Python 3.13 returns a circular link unresolved.
        return None if found.is_symlink() else found
    except (OSError, RuntimeError):
        return None


def _is_device(path: Path) -> bool:
    """Return True for a device, pipe or socket: opening one may block for ever or have side effects."""
    in_memory = path.is_relative_to(_MEMORY_FOLDER)
    if not in_memory and any(path.is_relative_to(folder) for folder in _DEVICE_FOLDERS):
        return True
    mode = _mode(path)
    return mode != 0 and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _mode(path: Path) -> int:
    """Return the path's mode bits as stat reports them; 0 if it cannot be read."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _outside(name: str, value: str) -> ForbiddenPathError:
    return ForbiddenPathError(
        f"{name}: {shown(value)} is not in a folder that may be reached. This ComfyUI can be reached from beyond this "
        f"machine, or {SETTING} is strict, so only {ALLOWED} can be named, and no path may hold '..'."
    )


def _circle(name: str, value: str) -> ForbiddenPathError:
    return ForbiddenPathError(f"{name}: {shown(value)} is a link that leads back to itself. Give the file or folder.")
