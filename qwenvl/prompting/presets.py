"""Presets: system and user text from small files, around what the user typed.

A file is a preset, and its name, with spaces for underscores, is the preset's name:
    .yaml, .yml   `text` and `system`, at least one of them; and `needs`, the pictures or video that it asks about
    .txt          the text
{text} and {system} stand for what the user typed. A user's preset replaces a built-in one of the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .. import paths
from ..checks import shown, text_of, whole_characters
from ..comfyui import host
from ..log import log
from ..packages import lack_of_module, require
from ..process import PROCESS
from ..settings import SYSTEM_PROMPT

NONE = "none"
BUILT_IN = Path(__file__).resolve().parent / "builtin_presets"
_SUFFIXES = (".yaml", ".yml", ".txt")
# Values of `needs` -> the fewest pictures; a video is enough for any of them.
NEEDS = {"": 0, "a picture": 1, "two pictures": 2, "a video": 2}
_MAX_BYTES = 100_000


class UnknownPresetError(ValueError):
    """A preset was asked for that no file defines."""


class NothingShownError(ValueError):
    """A preset asks about pictures or a video that the model does not get: it would invent the answer."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Templates of system prompt and text; an empty one leaves what the user typed. `needs` is a key of NEEDS."""

    system: str = ""
    text: str = ""
    needs: str = ""

    def fill(self, system: str, text: str) -> tuple[str, str]:
        """Return system prompt and text with what the user typed at its place in the template, or below the template.

        The default system prompt was not typed by the user, so a preset's system prompt replaces it.
        """
        own = "" if self.system and system.strip() == SYSTEM_PROMPT else system
        return _filled(self.system, "{system}", own), _filled(self.text, "{text}", text)


def listed() -> dict[str, Preset]:
    """Return name -> preset, read from the files at every call: first the built-in ones, then the user's."""
    return {**dict(_in_folder(BUILT_IN)), **dict(_in_folder(host.preset_folder()))}


def names() -> tuple[str, ...]:
    """Return the choices of the widget `preset`."""
    return (NONE, *listed())


def find(name: str) -> Preset:
    """Return the preset of that name. The name is only looked up in the list, and never becomes part of a path.

    Raises:
        MissingPackageError: PyYAML is not installed.
        UnknownPresetError: no file has that name; the message names the folder for it, and the presets that exist.
    """
    if text_of("preset", name) == NONE:
        return Preset()
    presets = listed()
    if name not in presets:
        require("yaml")  # without it all built-in presets are missing
        raise UnknownPresetError(
            f"preset {shown(name)} does not exist. Put its file into {host.preset_folder()}, "
            f"or pick one of: {', '.join((NONE, *presets))}."
        )
    return presets[name]


def require_shown(name: str, pictures: int, has_video: bool) -> None:
    """Raise NothingShownError if the preset needs more pictures, or a video.

    Args:
        pictures: number of pictures of a question.
    """
    needs = find(name).needs
    if not has_video and pictures < NEEDS[needs]:
        raise NothingShownError(
            f"preset {shown(name)} needs {needs}, and the model is shown {'only one picture' if pictures else 'none'}: "
            "it would make the answer up. Connect what it is to see to the QwenVL node (--image or --video on the "
            "command line), or pick another preset."
        )


def stamp(name: str | None) -> str:
    """Return a text that changes with the preset's file. None, and a name without a file, count as no preset."""
    return "" if name is None or name == NONE else repr(listed().get(name))


def _filled(template: str, place: str, typed: str) -> str:
    if not template:
        return typed
    if place in template:
        return template.replace(place, typed).strip()
    return f"{template.strip()}\n\n{typed}" if typed.strip() else template.strip()


def _in_folder(folder: Path) -> Iterator[tuple[str, Preset]]:
    """Yield name and preset of a folder's files, by name. A faulty file is logged and left out."""
    if not folder.is_dir():
        return
    roots = host.reachable()
    files = [file for file in folder.iterdir() if _is_preset(file, None if roots is None else [folder, *roots])]
    taken = {NONE: "no preset"}
    for file in sorted(files, key=lambda file: (file.stem.casefold(), file.name)):
        name = file.stem.replace("_", " ").strip()
        try:
            if name in taken:
                raise ValueError(f"the name {name!r} already means {taken[name]}")
            preset = _read(file)
        except (OSError, ValueError) as error:
            _complain(file, str(error))
        else:
            taken[name] = file.name
            yield name, preset


def _is_preset(file: Path, roots: list[Path] | None) -> bool:
    """Return True for a preset's file, but not for a link out of the readable folders, or a pipe, which would block."""
    named = file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
    return named and file.is_file() and (not file.is_symlink() or paths.is_within(file, roots))


def _read(file: Path) -> Preset:
    """Return the preset in a file; OSError or ValueError if it cannot be read."""
    with file.open("rb") as opened:
        content = opened.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES:,} bytes")
    found = _parsed(content, file.suffix.lower())
    if isinstance(found, str):
        raise ValueError(found)
    return found


# Cached, because ComfyUI asks for a node's inputs dozens of times a prompt. libyaml would be fast enough without a
# cache, but deep nesting crashes it.
@lru_cache(maxsize=256)
def _parsed(content: bytes, suffix: str) -> Preset | str:
    """Return the preset, or a sentence that says what is wrong with it."""
    try:
        text = content.decode("utf-8-sig")
        return _preset({"text": text} if suffix == ".txt" else _of_yaml(text))
    except (ValueError, RecursionError) as error:
        return str(error)


def _of_yaml(text: str) -> object:
    try:
        from . import plain_yaml
    except ModuleNotFoundError as error:
        raise ValueError(lack_of_module(error)) from error
    try:
        return plain_yaml.read(text)
    except plain_yaml.YamlError as error:
        raise ValueError(str(error)) from error


def _preset(content: object) -> Preset:
    if not isinstance(content, dict):
        raise ValueError("it must hold `text: ...`, `system: ...` or both")
    if unknown := [key for key in content if key not in ("text", "system", "needs")]:
        raise ValueError(f"it may hold `text`, `system` and `needs`, but it has {shown(unknown[0])}")
    if wrong := [key for key, part in content.items() if not isinstance(part, str)]:
        raise ValueError(f"{wrong[0]!r} must be text: put it in quotes, or behind `|` on lines of its own")
    if not any(part.strip() for key, part in content.items() if key != "needs"):
        raise ValueError("it is empty")
    if content.get("needs", "") not in NEEDS:
        raise ValueError(f"`needs` may be one of: {', '.join(filter(None, NEEDS))}; it is {shown(content['needs'])}")
    return Preset(**{key: whole_characters(part) for key, part in content.items()})


def _complain(file: Path, reason: str) -> None:
    if PROCESS.is_new(file, reason):
        log.warning("the preset %s is ignored: %s", file, " ".join(reason.split()))
