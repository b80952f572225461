"""A folder of pictures and the caption files beside them. Standard library only."""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import secrets
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from ..checks import shown, whole_characters
from ..log import log

# Of every kind of file that opening.py reads. Browsers save JPEGs under all of these names.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".webp", ".bmp", ".dib"),
    *(".gif", ".tif", ".tiff", ".avif", ".avifs"),
)
SORTS = ("name", "oldest first", "newest first")
# Of more, fnmatch makes an expression in a time that grows with their square.
_LONGEST_PATTERN = 255
_TEMPORARY = ".qwenvl-"
# A caption is written in far less, so a temporary file that is older belongs to nobody.
_LEFT_AFTER_S = 60.0
# What Windows says, and from how many letters on it may mean that.
_TOO_LONG, _NO_PATH, _LONGEST = 206, 3, 260


class FolderError(ValueError):
    """A folder of pictures cannot be used as it was asked for."""


class LongNameError(FolderError):
    """The file system takes no name of that length."""


def find_pictures(folder: Path, pattern: str = "", sort: str = "name", recursive: bool = False) -> list[Path]:
    """The picture files in a folder. Hidden files and folders are passed over.

    Args:
        pattern: what the file's name must look like, e.g. "*cat*.png", small and capital letters alike; "" is any.
        sort: one of SORTS. "name" puts 2 before 10, and each folder's files together.
        recursive: those in the folders below as well. Links to folders are not followed.

    Raises:
        FolderError: there is no such folder, or the pattern or the order does not exist.
    """
    if not folder.is_dir():
        raise FolderError(f"There is no folder {str(folder)!r}.")
    if "/" in pattern or "\\" in pattern:
        raise FolderError(f"pattern {shown(pattern)} must be that of a file's name, without a folder, such as '*.png'.")
    if len(pattern) > _LONGEST_PATTERN:
        raise FolderError(f"pattern {shown(pattern)} is longer than {_LONGEST_PATTERN} characters, as no name is.")
    if sort not in SORTS:
        raise FolderError(f"sort {shown(sort)} does not exist. Pick one of: {', '.join(SORTS)}.")
    try:
        wanted = re.compile(fnmatch.translate(pattern or "*"), re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        raise FolderError(f"pattern {shown(pattern)} is none ({shown(str(error))}).") from error
    found = [file for file in _files(folder, recursive) if _is_picture(file) and wanted.match(file.name)]
    found.sort(key=lambda file: _natural(file.relative_to(folder)))
    if sort != "name":
        found.sort(key=lambda file: file.stat().st_mtime_ns, reverse=sort == "newest first")
    return found


def caption_files(files: Iterable[Path], suffix: str = ".txt") -> dict[Path, Path]:
    """Picture -> its caption's file, each its own, in whatever order the pictures come.

    The name with another suffix; behind the whole name where two would share it; and a number where that is shared.

    Raises:
        FolderError: captions with this suffix would not be files of their own.
    """
    if not re.fullmatch(r"\.[\w.-]*\w", suffix) or suffix.lower().endswith(SUFFIXES):
        raise FolderError(f"suffix {shown(suffix)} must be a dot and a name that is no picture's, such as '.txt'.")
    files = list(dict.fromkeys(files))
    short = {file: file.with_name(f"{_without_suffix(file.name)}{suffix}") for file in files}
    shared = Counter(map(_same, short.values()))
    whole = {file: file.with_name(f"{file.name}{suffix}") for file in files}
    short = {file: caption for file, caption in short.items() if shared[_same(caption)] == 1}
    # What falls back to the whole name may take the short name of another picture, which then falls back too.
    while taken := {_same(whole[file]) for file in files if file not in short} & set(map(_same, short.values())):
        short = {file: caption for file, caption in short.items() if _same(caption) not in taken}
    used = set(map(_same, short.values()))
    found = dict(short)
    for file in sorted(file for file in files if file not in short):
        found[file] = next(caption for caption in _numbered(file, whole[file], suffix) if _same(caption) not in used)
        used.add(_same(found[file]))
    return {file: found[file] for file in files}


def _same(path: Path) -> str:
    """Equal for paths that Windows or macOS may take for one: they differ in capitals or in how accents are put."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", str(path)).casefold())


def _numbered(file: Path, whole: Path, suffix: str) -> Iterator[Path]:
    yield whole
    for number in count(2):
        yield file.with_name(f"{file.name}~{number}{suffix}")


def is_there(file: Path) -> bool:
    """Whether there is something of this name.

    Raises:
        LongNameError: there can be nothing.
    """
    try:
        file.stat()  # newer versions of Python say of exists() that there is none, whatever the reason
    except (FileNotFoundError, NotADirectoryError) as error:
        if _is_too_long(file, error):
            raise _cannot_write(file, error) from error
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False  # a link to itself, which the caption replaces
        raise _cannot_write(file, error) from error
    return True


def write_whole(file: Path, text: str) -> None:
    """Write the file so that it is there whole or, whatever happens, not at all: an old one stays until then.

    Raises:
        LongNameError: the file system takes no such name; others it may take.
        FolderError: the disk is full, or the folder cannot be written to.
    """
    temporary = file.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as opened:
            opened.write(whole_characters(text))
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    except OSError as error:
        raise _cannot_write(file, error) from error
    finally:
        with suppress(OSError):  # it is gone already, or was never made
            temporary.unlink()


def require_writable(folders: Iterable[Path]) -> None:
    """Raise FolderError where one of the folders takes no files, as far as the system tells without trying."""
    for folder in folders:
        if not os.access(folder, os.W_OK):
            raise _cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Delete what a run that was killed in the middle of a caption left in these folders."""
    for file in (file for folder in folders for file in folder.glob(f"{_TEMPORARY}*.tmp")):
        with suppress(OSError):  # another run was faster, or the folder is read-only
            # From the future are those of a clock that has been put back since.
            if abs(time.time() - file.stat().st_mtime) > _LEFT_AFTER_S:
                file.unlink()


def _cannot_write(file: Path, error: OSError) -> FolderError:
    if _is_too_long(file, error):
        return LongNameError(
            f"{str(file)!r} cannot be written: the name is longer than the file system takes. Give the picture a "
            "shorter name."
        )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "Make room and run it again" if full else "Allow writing there, or choose another folder"
    return FolderError(f"{str(file)!r} cannot be written ({error.strerror or error}). {advice}: what is there stays.")


def _is_too_long(file: Path, error: OSError) -> bool:
    """Windows says of such a path that it is too long, or that there is none."""
    code = getattr(error, "winerror", None)
    return error.errno == errno.ENAMETOOLONG or code == _TOO_LONG or (code == _NO_PATH and len(str(file)) >= _LONGEST)


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    """In no order. Folder by folder: os.walk itself calls itself, and folders may lie deeper than Python follows."""
    waiting = [folder]
    while waiting:
        where = waiting.pop()
        walk = os.walk(where, onerror=lambda error: log.warning("left out: %s", error))
        _, folders, names = next(walk, (where, [], []))
        seen = [Path(where, name) for name in folders if recursive and not name.startswith(".")]
        waiting += [below for below in seen if not below.is_symlink()]
        yield from (Path(where, name) for name in names if not name.startswith("."))


def make_folder(folder: Path) -> None:
    """The folder and those that it lies in: Path.mkdir calls itself for each of them. OSError where it cannot be."""
    missing = [folder]
    while not missing[-1].parent.exists() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for each in reversed(missing):
        each.mkdir(exist_ok=True)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.is_file()


def _without_suffix(name: str) -> str:
    """Only a picture's suffix is one: a name may have other dots."""
    stem, dot, suffix = name.rpartition(".")
    return stem if f"{dot}{suffix}".lower() in SUFFIXES and stem else name


def _natural(path: Path) -> list[list[tuple[int, int | str]]]:
    """A key that sorts numbers in names by their value."""
    return [
        [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in re.split(r"(\d+)", part.casefold()) if piece]
        for part in path.parts
    ]
