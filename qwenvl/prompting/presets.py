"""Presets: system and user text from small files, around what the user typed.

A file is a preset, and its name, with spaces for underscores, is the preset's name:
    .yaml, .yml   `text` and `system`, one of them at least; and `needs`, what there must be to look at
    .txt          the text
{text} and {system} stand for what the user typed. A user's preset takes the place of a built-in one of its name.
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
# What a preset may need, and how many pictures that is at least; a video is as good as many.
NEEDS = {"": 0, "a picture": 1, "two pictures": 2, "a video": 2}
_MAX_BYTES = 100_000
# Files that have been complained of: the lists are made for every look at a node.


class UnknownPresetError(ValueError):
    """A preset was asked for that is in no folder."""


class NothingShownError(ValueError):
    """A preset asks about something that the model is not shown: its answer would be made up."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Two templates. An empty one leaves what the user typed as it is. It needs one of NEEDS."""

    system: str = ""
    text: str = ""
    needs: str = ""

    def fill(self, system: str, text: str) -> tuple[str, str]:
        """System and user text with what the user typed in its place, or below where the template names no place.

        The default system prompt says nothing that the user wanted, so a preset's takes its place.
        """
        own = "" if self.system and system.strip() == SYSTEM_PROMPT else system
        return _filled(self.system, "{system}", own), _filled(self.text, "{text}", text)


def listed() -> dict[str, Preset]:
    """Name -> preset, read from the files at every call: first the built-in ones, then the user's."""
    return {**dict(_in_folder(BUILT_IN)), **dict(_in_folder(host.preset_folder()))}


def names() -> tuple[str, ...]:
    """What the widget offers."""
    return (NONE, *listed())


def find(name: str) -> Preset:
    """The preset of that name. A name is only ever looked up in the list: it never becomes part of a path.

    Raises:
        MissingPackageError: what reads such files is not installed.
        UnknownPresetError: no file has that name; the message says where it would be, and which there are.
    """
    if text_of("preset", name) == NONE:
        return Preset()
    presets = listed()
    if name not in presets:
        require("yaml")  # the one thing that all of ours need
        raise UnknownPresetError(
            f"preset {shown(name)} does not exist. Put its file into {host.preset_folder()}, "
            f"or pick one of: {', '.join((NONE, *presets))}."
        )
    return presets[name]


def require_shown(name: str, pictures: int, has_video: bool) -> None:
    """Raise NothingShownError where the preset needs more to look at.

    Args:
        pictures: how many a question is about.
    """
    needs = find(name).needs
    if not has_video and pictures < NEEDS[needs]:
        raise NothingShownError(
            f"preset {shown(name)} needs {needs}, and the model is shown {'only one picture' if pictures else 'none'}: "
            "it would make the answer up. Connect what it is to see to the QwenVL node (--image or --video on the "
            "command line), or pick another preset."
        )


def stamp(name: str | None) -> str:
    """Changes when the preset's file does. None, and a name that is gone, stand for no preset."""
    return "" if name is None or name == NONE else repr(listed().get(name))


def _filled(template: str, place: str, typed: str) -> str:
    if not template:
        return typed
    if place in template:
        return template.replace(place, typed).strip()
    return f"{template.strip()}\n\n{typed}" if typed.strip() else template.strip()


def _in_folder(folder: Path) -> Iterator[tuple[str, Preset]]:
    """The presets of a folder in the order of their names. A mistake in a file costs this preset only."""
    if not folder.is_dir():
        return
    roots = host.reachable()
    files = [file for file in folder.iterdir() if _is_preset(file, None if roots is None else [folder, *roots])]
    taken = {NONE: "no preset"}
    for file in sorted(files, key=lambda file: (file.stem.casefold(), file.name)):
        name = file.stem.replace("_", " ").strip()
        try:
            if name in taken:
                raise ValueError(f"the name {name!r} stands for {taken[name]} already")
            preset = _read(file)
        except (OSError, ValueError) as error:
            _complain(file, str(error))
        else:
            taken[name] = file.name
            yield name, preset


def _is_preset(file: Path, roots: list[Path] | None) -> bool:
    """A link may lead out of what may be reached, and reading from a pipe would wait for ever."""
    named = file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
    return named and file.is_file() and (not file.is_symlink() or paths.is_within(file, roots))


def _read(file: Path) -> Preset:
    """Raises OSError or ValueError where the file holds no preset."""
    with file.open("rb") as opened:
        content = opened.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES:,} bytes")
    found = _parsed(content, file.suffix.lower())
    if isinstance(found, str):
        raise ValueError(found)
    return found


# ComfyUI asks for a node's inputs dozens of times a prompt. libyaml would be fast enough without, but nesting that is
# too deep for it ends the process.
@lru_cache(maxsize=256)
def _parsed(content: bytes, suffix: str) -> Preset | str:
    """The preset, or what is wrong with it."""
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
