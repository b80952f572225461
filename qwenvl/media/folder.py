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

# The suffixes of all kinds that opening.py reads. Browsers save JPEGs under several of them.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".webp", ".bmp", ".dib"),
    *(".gif", ".tif", ".tiff", ".avif", ".avifs"),
)
SORTS = ("name", "oldest first", "newest first")
# The time fnmatch takes to translate a pattern grows with the square of its length.
_LONGEST_PATTERN = 255
_TEMPORARY = ".qwenvl-"
# Writing a caption takes far less, so an older temporary file was left by a run that was killed.
_LEFT_AFTER_S = 60.0
# Windows' codes for a path that is too long and for a missing one, which from _LONGEST letters on may mean the same.
_TOO_LONG, _NO_PATH, _LONGEST = 206, 3, 260


class FolderError(ValueError):
    """A folder of pictures cannot be used as it was asked for."""


class LongNameError(FolderError):
    """The file system takes no name of that length."""


def find_pictures(folder: Path, pattern: str = "", sort: str = "name", recursive: bool = False) -> list[Path]:
    """List the picture files in a folder, without hidden files and folders.

    Args:
        pattern: what a file's name must match, e.g. "*cat*.png", in small or capital letters; "" matches any.
        sort: one of SORTS. "name" puts 2 before 10, and each folder's files together.
        recursive: look into the folders below as well. Links to folders are not followed.

    Raises:
        FolderError: there is no such folder, the pattern is not valid, or the order does not exist.
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
        why = shown(str(error))
        raise FolderError(f"pattern {shown(pattern)} is not a valid file-name pattern ({why}).") from error
    found = [file for file in _files(folder, recursive) if _is_picture(file) and wanted.match(file.name)]
    found.sort(key=lambda file: _natural(file.relative_to(folder)))
    if sort != "name":
        found.sort(key=lambda file: file.stat().st_mtime_ns, reverse=sort == "newest first")
    return found


def caption_files(files: Iterable[Path], suffix: str = ".txt") -> dict[Path, Path]:
    """Choose a caption file of its own for each picture: {picture: caption}. The order of the pictures does not matter.

    The caption has the picture's name with the new suffix in place of its own. If two would share that name, the new
    suffix follows the picture's whole name; if that is taken too, a number is added.

    Raises:
        FolderError: the suffix is not valid, or is that of a picture.
    """
    if not re.fullmatch(r"\.[\w.-]*\w", suffix) or suffix.lower().endswith(SUFFIXES):
        raise FolderError(f"suffix {shown(suffix)} must be a dot and a name that is no picture's, such as '.txt'.")
    files = list(dict.fromkeys(files))
    short = {file: file.with_name(f"{_without_suffix(file.name)}{suffix}") for file in files}
    shared = Counter(map(_same, short.values()))
    whole = {file: file.with_name(f"{file.name}{suffix}") for file in files}
    short = {file: caption for file, caption in short.items() if shared[_same(caption)] == 1}
    # A whole name may be another picture's short name; then that picture falls back to its whole name too.
    while taken := {_same(whole[file]) for file in files if file not in short} & set(map(_same, short.values())):
        short = {file: caption for file, caption in short.items() if _same(caption) not in taken}
    used = set(map(_same, short.values()))
    found = dict(short)
    for file in sorted(file for file in files if file not in short):
        found[file] = next(caption for caption in _numbered(file, whole[file], suffix) if _same(caption) not in used)
        used.add(_same(found[file]))
    return {file: found[file] for file in files}


def _same(path: Path) -> str:
    """Return a key that is equal for paths that Windows or macOS may take for one: capitals and accents may differ."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", str(path)).casefold())


def _numbered(file: Path, whole: Path, suffix: str) -> Iterator[Path]:
    yield whole
    for number in count(2):
        yield file.with_name(f"{file.name}~{number}{suffix}")


def is_there(file: Path) -> bool:
    """Tell if anything of this name exists.

    Raises:
        LongNameError: the name is too long for a file to have.
        FolderError: the system refuses to look.
    """
    try:
        file.stat()  # in newer versions of Python exists() is False for every error
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
    """Write the file whole or, whatever happens, not at all: an old file stays until the new one is complete.

    Raises:
        LongNameError: the name is too long for the file system; other files may still be written.
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
        with suppress(OSError):  # it has been moved into place, or was never created
            temporary.unlink()


def require_writable(folders: Iterable[Path]) -> None:
    """Raise FolderError if a folder cannot be written to, as far as the system shows without writing."""
    for folder in folders:
        if not os.access(folder, os.W_OK):
            raise _cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Delete temporary files in these folders that are left of runs that were killed while they wrote a caption."""
    for file in (file for folder in folders for file in folder.glob(f"{_TEMPORARY}*.tmp")):
        with suppress(OSError):  # another run has deleted it, or the folder is read-only
            # A file from the future is old too: the clock has been set back since.
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
    """Tell if the path was too long. Windows reports that as a path that is too long, or as a missing one."""
    code = getattr(error, "winerror", None)
    return error.errno == errno.ENAMETOOLONG or code == _TOO_LONG or (code == _NO_PATH and len(str(file)) >= _LONGEST)


def _files(folder: Path, recursive: bool) -> Iterator[Path]:
    """Yield the files, in no order. os.walk recurses at every level, and folders may be deeper than Python allows."""
    waiting = [folder]
    while waiting:
        where = waiting.pop()
        walk = os.walk(where, onerror=lambda error: log.warning("left out: %s", error))
        _, folders, names = next(walk, (where, [], []))
        seen = [Path(where, name) for name in folders if recursive and not name.startswith(".")]
        waiting += [below for below in seen if not below.is_symlink()]
        yield from (Path(where, name) for name in names if not name.startswith("."))


def make_folder(folder: Path) -> None:
    """Create the folder and its missing parents; OSError if that fails. Path.mkdir calls itself for each parent."""
    missing = [folder]
    while not missing[-1].parent.exists() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for below in reversed(missing):
        below.mkdir(exist_ok=True)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.is_file()


def _without_suffix(name: str) -> str:
    """Cut off a picture's suffix. Anything else behind a dot is a part of the name."""
    stem, dot, suffix = name.rpartition(".")
    return stem if f"{dot}{suffix}".lower() in SUFFIXES and stem else name


def _natural(path: Path) -> list[list[tuple[int, int | str]]]:
    """Return a sort key that puts numbers in names in order of their value."""
    return [
        [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in re.split(r"(\d+)", part.casefold()) if piece]
        for part in path.parts
    ]
