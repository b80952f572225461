"""The one way from a value in a widget to a path: whoever may queue prompts may not read or write everything.

Standard library only. Which folders may be reached is for the caller to say.
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

# "auto": any local path while nobody but this machine reaches ComfyUI. "strict": ComfyUI's own folders always.
SETTING, _CHOICES = "QWENVL_PATHS", ("auto", "strict")
ALLOWED = "ComfyUI's input, output, temp or user folder"
# Two letters at least: one is a drive of Windows.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
# file:/a, file:///a and file://localhost/a; the host is apart.
_FILE_URL = re.compile(r"file:(?://([^/\\]*))?(/.*)", re.IGNORECASE | re.DOTALL)
_THIS_MACHINE = ("", "localhost", "127.0.0.1", "[::1]")
_DRIVE = re.compile(r"[A-Za-z]:")
_QUOTES = ('""', "''", "\u201c\u201d", "\u2018\u2019", "\u201e\u201c", "\u00ab\u00bb", "``")
# Marks that turn text to the right or left, joiners, and the mark at the start of a file: nobody sees them, and "Copy
# as path" and chats put them there. Spaces of every width go too.
_UNSEEN = re.compile(r"[\s\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
# Quotes within marks within quotes: more than this is no accident.
_MOST_LAYERS = 4
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?", re.IGNORECASE)
# PROGRA~1 is another name of a folder, and Windows takes the dots and spaces at the end of a name away.
_ALIAS = re.compile(r"[^.]{0,6}~[0-9]{1,6}(\.[^.]{0,3})?|.*[^. ][. ]+|\.\.[. ]+")
# The most that Linux takes, in bytes. Windows counts letters.
_LONGEST_PATH, _LONGEST_NAME = 4095, 255
_DEVICE_FOLDERS = tuple(Path(name) for name in ("/dev", "/proc", "/sys"))
# Files in memory, an ordinary place for large data.
_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108


class ForbiddenPathError(ValueError):
    """A path that a widget may not name."""


def are_confined(listen: str, cors: object = None) -> bool:
    """Whether widgets may name ComfyUI's own folders only: others than this machine's user may queue prompts.

    Args:
        listen: ComfyUI's option of that name: addresses, with commas.
        cors: its --enable-cors-header, by which any page that the user looks at may queue prompts.
    """
    asked = os.environ.get(SETTING, _CHOICES[0]).strip().lower()
    return _is_strict(asked) or bool(cors) or not all(map(_is_loopback, listen.split(",")))


def _is_strict(asked: str) -> bool:
    """A word that is none is told of once: the question comes dozens of times a prompt."""
    if asked not in _CHOICES and PROCESS.is_new(SETTING, asked):
        log.warning("%s is %r, which is none of %s: taken as strict", SETTING, asked, ", ".join(_CHOICES))
    return asked != _CHOICES[0]


def _is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address. A name other than localhost may mean anything."""
    try:
        return ipaddress.ip_address(address.strip()).is_loopback
    except ValueError:
        return address.strip() == "localhost"


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
    value = unwrapped(value, windows=os.name == "nt")
    if reason := why_not_local(value, windows=os.name == "nt"):
        raise ForbiddenPathError(f"{name}: {shown(value)} {reason}.")
    if roots is not None and is_roundabout(value, windows=os.name == "nt"):
        raise _outside(name, value)
    given = Path(value)
    if given.parts[:1] == ("~",):
        with contextlib.suppress(RuntimeError):  # nobody's home
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
    """The path in what was pasted: without quotes, spaces and unseen marks around it, and from a file: URL of this
    machine. Pure. What comes out is trusted no more than what went in: every check follows.
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
            value = value.strip('"')  # which no name there holds: cmd makes a:\b" of "a:\b\"
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
    """What was typed at a prompt of this machine, where nothing has that very name: the path in it."""
    try:
        if os.path.lexists(value):
            return value
    except ValueError:
        return value
    return unwrapped(value, windows=os.name == "nt")


def is_within(path: Path, roots: Sequence[Path] | None) -> bool:
    """Whether the path, links followed, is below one of the roots, or is one."""
    if roots is None:
        return True
    found = real(path)
    return found is not None and any(found.is_relative_to(root) for root in map(real, roots) if root)


def why_not_local(value: str, *, windows: bool) -> str | None:
    """Why the text cannot be a path on a disk of this machine, or None. Pure: it looks at no disk and no network."""
    if not value:
        return "is empty: give a path"
    if not _is_text(value):
        return "holds a character that no path can hold"
    if _is_too_long(value, windows):
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


def is_roundabout(value: str, *, windows: bool) -> bool:
    """Whether the text says where it leads in another way than by names from top to bottom. Pure."""
    parts = PurePath(value.replace("\\", "/")).parts
    return ".." in parts or (windows and any(_ALIAS.fullmatch(part) for part in parts))


def _is_too_long(value: str, windows: bool) -> bool:
    """Python says so in other ways than that there is no such file."""
    text = value if windows else os.fsencode(value).decode("latin-1")
    return len(text) > _LONGEST_PATH or max(map(len, re.split(r"[\\/]" if windows else "/", text))) > _LONGEST_NAME


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def real(path: Path) -> Path | None:
    """The path with every link followed; None where links go round in a circle."""
    try:
        found = path.resolve()
        # Python 3.13 leaves such a link as it is.
        return None if found.is_symlink() else found
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
        f"{name}: {shown(value)} is not in a folder that may be reached. This ComfyUI can be reached from beyond this "
        f"machine, or {SETTING} is strict, so only {ALLOWED} can be named, and no path may hold '..'."
    )


def _circle(name: str, value: str) -> ForbiddenPathError:
    return ForbiddenPathError(f"{name}: {shown(value)} is a link that leads back to itself. Give the file or folder.")
