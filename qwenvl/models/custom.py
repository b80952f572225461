"""Reads custom_models.json, the user's own models and engines, and reports its mistakes. Standard library only."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import shown
from ..files.bounded_json import SETTINGS, OversizeError, content_of, parse
from ..log import log
from ..paths import why_not_local
from .builtin import Model
from .engines import Engine, engines_of

# The keys under which this pack and the most used other pack list models.
MODEL_KEYS = ("hf_models", "hf_vl_models", "hf_text_models", "models")
_TOP_KEYS = (*MODEL_KEYS, "engines")
# Keys and types of an entry. Only the first two have an effect: everything else is read from the model itself.
_ENTRY: dict[str, type] = {
    "repo_id": str,
    "path": str,
    "model_class": str,
    "default": bool,
    "quantized": bool,
    "vram_requirement": dict,
    "description": str,
}
# The hub and file systems allow no longer names.
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_MOST_COMPLAINTS = 20  # in the log, for one file
_JSON_NAMES: dict[type, str] = {str: "a text", bool: "true or false", dict: "an object"}


@dataclass(frozen=True, slots=True)
class _Content:
    models: tuple[Model, ...] = ()
    engines: tuple[Engine, ...] = ()


def custom_models(path: Path) -> tuple[Model, ...]:
    """Return the file's models, in its order. An entry with a mistake is left out, with one line in the log."""
    return _content(path).models


def custom_engines(path: Path) -> tuple[Engine, ...]:
    """Return the file's engines, in its order. An entry with a mistake is left out, with one line in the log."""
    return _content(path).engines


def bring_over(edited: Path, place: Path) -> None:
    """Copy the file to a place that no update touches, once, and only if the user has added something to it."""
    try:
        if place.exists() or not edited.exists():
            return
        content = content_of(edited, SETTINGS)
        if not _has_entries(content):
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its place and moved, so that it is there whole or not at all.
        unfinished = place.with_name(f"{place.name}.{os.getpid()}.part")
        unfinished.write_bytes(content)
        unfinished.replace(place)
    except (OSError, OversizeError) as error:
        log.warning("your models in %s could not be copied to %s (%s): an update takes them away", edited, place, error)
    else:
        log.warning(
            "your models in %s were copied to %s, where no update comes: change that file from now on", edited, place
        )


def _has_entries(content: bytes) -> bool:
    """Tell if a file holds more than the one that ships. A file with mistakes has been edited by the user."""
    try:
        found = parse(content, SETTINGS)
    except (ValueError, RecursionError):
        return True
    if not isinstance(found, dict):
        return True
    return any(section for key, section in found.items() if not key.startswith(("_", "$")))


def _content(path: Path) -> _Content:
    try:
        state = path.stat()
    except OSError:
        return _Content()
    return _read(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _read(path: Path, modified: int, size: int) -> _Content:
    """Read the file. Time and size are arguments so that the cached result is dropped when the file changes."""
    try:
        content = parse(content_of(path), SETTINGS)
    except json.JSONDecodeError as error:
        log.warning("%s, line %d, column %d: %s. It is left out.", path, error.lineno, error.colno, error.msg)
        return _Content()
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, a number with thousands of digits, too deep
        log.warning("%s cannot be read: %s. It is left out.", path, error)
        return _Content()
    if not isinstance(content, dict):
        log.warning("%s: it must hold an object, so it is left out.", path)
        return _Content()
    complaints: list[str] = []
    models = tuple(_models(content, complaints))
    for complaint in complaints[:_MOST_COMPLAINTS]:
        log.warning("%s: %s.", path, complaint)
    if len(complaints) > _MOST_COMPLAINTS:
        log.warning("%s: it has more mistakes, which are not listed.", path)
    return _Content(models, engines_of(path.name, content.get("engines", {})))


class _EntryError(ValueError):
    """A mistake in the value that `keys` lead to, from the top of the file."""

    def __init__(self, keys: tuple[str, ...], what: str) -> None:
        super().__init__(_at(keys, what))


def _at(keys: tuple[str, ...], what: str) -> str:
    return f"{' > '.join(map(shown, keys))}: {what}"


def _models(content: dict[str, Any], complaints: list[str]) -> Iterator[Model]:
    for key, section in content.items():
        if key not in _TOP_KEYS and not key.startswith(("_", "$")):
            complaints.append(_at((key,), f"there is no such key; those that hold models are {', '.join(MODEL_KEYS)}"))
        elif key in MODEL_KEYS and not isinstance(section, dict):
            complaints.append(_at((key,), "it must map names to models, so it is left out"))
        elif key in MODEL_KEYS:
            yield from _section(key, section, complaints)


def _section(key: str, section: dict[str, Any], complaints: list[str]) -> Iterator[Model]:
    for name, entry in section.items():
        try:
            yield _model(name, _checked((key, name), entry, complaints), (key, name))
        except _EntryError as error:
            complaints.append(f"{error}; the model is left out")


def _checked(where: tuple[str, ...], entry: Any, complaints: list[str]) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise _EntryError(where, "it must be an object with repo_id or path")
    for key, value in entry.items():
        if key not in _ENTRY:
            complaints.append(_at((*where, key), f"there is no such key; known are {', '.join(_ENTRY)}"))
        elif not isinstance(value, _ENTRY[key]):
            raise _EntryError((*where, key), f"it must be {_JSON_NAMES[_ENTRY[key]]}, got {shown(value)}")
    return entry


def _model(name: str, entry: dict[str, Any], where: tuple[str, ...]) -> Model:
    repo_id, path = entry.get("repo_id", ""), entry.get("path", "")
    if not repo_id and not path:
        raise _EntryError(where, "it needs repo_id or path")
    if repo_id and not _REPO_ID.fullmatch(repo_id):
        raise _EntryError((*where, "repo_id"), f"it must look like 'owner/name', got {shown(repo_id)}")
    if path and not Path(path).is_absolute():
        raise _EntryError((*where, "path"), f"it must be an absolute folder, got {shown(path)}")
    if path and (reason := why_not_local(path, windows=os.name == "nt")):
        raise _EntryError((*where, "path"), f"{shown(path)} {reason}")
    return Model(name, repo_id, Path(path) if path else None)
