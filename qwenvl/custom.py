"""custom_models.json: the user's own models, and what is wrong with the file. Standard library only.

Checked by hand: ComfyUI brings no JSON schema library, and a schema error would not say in which line it is.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .builtin import Model
from .checks import shown
from .log import log
from .paths import why_not_local

# The keys under which this pack and the most used other one keep models. `engines` is read elsewhere.
MODEL_KEYS = ("hf_models", "hf_vl_models", "hf_text_models", "models")
_TOP_KEYS = (*MODEL_KEYS, "engines")
# What an entry may hold. Only the first two decide anything: what a model is, is read from the model.
_ENTRY: dict[str, type] = {
    "repo_id": str,
    "path": str,
    "model_class": str,
    "default": bool,
    "quantized": bool,
    "vram_requirement": dict,
    "description": str,
}
# Longer names are none on the hub, and none that a disk takes.
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# Complaints about one file: each is looked up in its text.
_MOST_COMPLAINTS = 20
_JSON_NAMES: dict[type, str] = {str: "a text", bool: "true or false", dict: "an object"}


def custom_models(path: Path) -> tuple[Model, ...]:
    """The models of the file, in its order. A mistake costs what it concerns, and is named in the log once."""
    try:
        state = path.stat()
    except OSError:
        return ()
    return _read(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _read(path: Path, modified: int, size: int) -> tuple[Model, ...]:
    """Cached by what changes when the file does."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except json.JSONDecodeError as error:
        log.warning("%s, line %d, column %d: %s. Its models are left out.", path, error.lineno, error.colno, error.msg)
        return ()
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, too deep
        log.warning("%s cannot be read: %s. Its models are left out.", path, error)
        return ()
    return tuple(_File(path, text).models(content))


class _EntryError(ValueError):
    """What is wrong with the value of a key; `keys` lead to it from the top."""

    def __init__(self, keys: tuple[str, ...], what: str) -> None:
        super().__init__(what)
        self.keys = keys


class _File:
    """One file under check; every complaint says where."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._text = text
        self._complaints = 0

    def models(self, content: Any) -> Iterator[Model]:
        if not isinstance(content, dict):
            self._complain((), "it must hold an object, so its models are left out")
            return
        for key, section in content.items():
            if key not in _TOP_KEYS and not key.startswith(("_", "$")):
                self._complain((key,), f"there is no such key; those that hold models are {', '.join(MODEL_KEYS)}")
            elif key in MODEL_KEYS and not isinstance(section, dict):
                self._complain((key,), "it must map names to models, so it is left out")
            elif key in MODEL_KEYS:
                yield from self._section(key, section)

    def _section(self, key: str, section: dict[str, Any]) -> Iterator[Model]:
        for name, entry in section.items():
            try:
                yield _model(name, self._checked((key, name), entry), (key, name))
            except _EntryError as error:
                self._complain(error.keys, f"{error}; the model is left out")

    def _checked(self, where: tuple[str, ...], entry: Any) -> dict[str, Any]:
        if not isinstance(entry, dict):
            raise _EntryError(where, "it must be an object with repo_id or path")
        for key, value in entry.items():
            if key not in _ENTRY:
                self._complain((*where, key), f"there is no such key; known are {', '.join(_ENTRY)}")
            elif not isinstance(value, _ENTRY[key]):
                raise _EntryError((*where, key), f"it must be {_JSON_NAMES[_ENTRY[key]]}, got {shown(value)}")
        return entry

    def _complain(self, keys: tuple[str, ...], what: str) -> None:
        self._complaints += 1
        if self._complaints == _MOST_COMPLAINTS:
            log.warning("%s: there is more that is wrong with it, which is not listed.", self._path)
        if self._complaints >= _MOST_COMPLAINTS:
            return
        line, column = self._position(keys)
        named = " > ".join(map(shown, keys)) or "the file"
        log.warning("%s, line %d, column %d: %s: %s.", self._path, line, column, named, what)

    def _position(self, keys: tuple[str, ...]) -> tuple[int, int]:
        """Line and column of a key, found by going down from key to key."""
        at = 0
        for key in keys:
            # As it may be written in the file: with or without \u escapes.
            written = "|".join(re.escape(json.dumps(key, ensure_ascii=ascii_)) for ascii_ in (True, False))
            found = re.compile(rf"({written})\s*:").search(self._text, at)
            at = found.start() if found else at
        before = self._text[:at]
        return before.count("\n") + 1, at - before.rfind("\n")


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
