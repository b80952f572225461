"""The nodes QwenVL Load Folder and QwenVL Save Captions: load a folder's pictures, write text files beside them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import paths
from ..checks import checked, one_of, require_text, shown, text_of
from ..comfyui import host
from ..comfyui.progress import NodeWatch
from ..log import gigabytes, log
from ..media import media
from ..media.folder import (
    SORTS,
    FolderError,
    LongNameError,
    caption_files,
    find_pictures,
    is_there,
    make_folder,
    write_whole,
)
from ..media.opening import BROKEN_PICTURE, open_picture
from .lists import first

_WHERE = "Any folder of this machine; where ComfyUI listens beyond it, one in its input, output, temp or user folder."
# A picture in memory: three channels of 4 bytes.
_BYTES_PER_PIXEL = 12
EXISTING = ("skip", "overwrite")


class QwenVLLoadFolder:
    """The node that loads a folder's pictures, as a list, since pictures of different sizes cannot be a batch."""

    DESCRIPTION = (
        "Load the pictures of a folder as a list, with their names. Thousands of them, which do not fit into memory "
        "together, are captioned by the command line: python -m qwenvl caption FOLDER."
    )
    CATEGORY = "QwenVL"
    FUNCTION = "load"
    RETURN_TYPES = ("IMAGE", "STRING", "STRING")
    RETURN_NAMES = ("images", "names", "folder")
    OUTPUT_IS_LIST = (True, True, False)
    OUTPUT_TOOLTIPS = (
        "A list of pictures, each of its own size. Transparent parts are white.",
        "The pictures' file names, for QwenVL Save Captions.",
        "The folder, for QwenVL Save Captions: captions then lie beside their pictures.",
    )
    SEARCH_ALIASES = ("load images", "directory", "dataset", "batch", "image list", "caption")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "folder": (
                    "STRING",
                    {"default": "", "tooltip": f"A folder's path, or its name in ComfyUI's input folder. {_WHERE}"},
                ),
                "pattern": (
                    "STRING",
                    {"default": "*", "tooltip": "Which names: * is any text and ? any letter, as in *_front.png."},
                ),
                "sort": (
                    list(SORTS),
                    {"default": SORTS[0], "tooltip": "By name (2 comes before 10), or by when they were changed."},
                ),
                "limit": (
                    "INT",
                    {"default": 0, "min": 0, "max": 1_000_000, "tooltip": "Only the first so many. 0 is all of them."},
                ),
            },
            "optional": {
                "skip_captioned": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Leave out pictures that have a caption file beside them, so that only new ones are "
                        "asked about. Where none is left, the nodes behind this one have nothing to do.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **values: Any) -> Any:
        if any(value is None for value in values.values()):
            return ""  # a value that another node will deliver
        try:
            states = [(file.name, file.stat()) for file in _listed(**values)[1]]
        except (OSError, ValueError):
            return ""  # the error is raised when the node runs
        return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)

    def load(
        self, folder: str, pattern: str, sort: str, limit: int, skip_captioned: bool = False
    ) -> tuple[list[Any], list[Any], str]:
        where, files, had_one = _listed(folder, pattern, sort, limit, skip_captioned)
        _require_memory(files)
        watch = NodeWatch(max(1, len(files)))
        images, names, unreadable = [], [], []
        for number, file in enumerate(files, 1):
            try:
                (picture,) = media.pictures({file.name: file})
            except media.MediaError as error:
                unreadable.append(file.name)
                log.warning("left out: %s", error)
            else:
                images.append(torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None])
                names.append(file.name)
            watch.read(number, len(files))
        if not images and not had_one:
            raise FolderError(f"folder: {shown(folder)} holds no picture that can be read, like {shown(pattern)}.")
        parts = [f"{len(images)} pictures"]
        parts += [f"{had_one} left out, with a caption"] if had_one else []
        parts += [f"unreadable: {', '.join(unreadable)}"] if unreadable else []
        watch.end("; ".join(parts))
        return images or host.nothing_to_do(), names or host.nothing_to_do(), str(where)


class QwenVLSaveCaptions:
    """The node that saves captions.

    INPUT_IS_LIST, to compare the numbers of texts and names: otherwise a text could be lost unnoticed.
    """

    DESCRIPTION = "Write each text into a file of its own, named after its picture: a.png gets a.txt."
    CATEGORY = "QwenVL"
    FUNCTION = "save"
    OUTPUT_NODE = True
    INPUT_IS_LIST = True
    RETURN_TYPES = ()
    RETURN_NAMES = ()
    OUTPUT_TOOLTIPS = ()
    SEARCH_ALIASES = ("save text", "caption files", "dataset", "txt", "tags")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text": ("STRING", {"forceInput": True, "tooltip": "The captions, one for each name."}),
                "names": ("STRING", {"forceInput": True, "tooltip": "The pictures' names, of QwenVL Load Folder."}),
                "folder": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Where to: a folder's path, or a name in ComfyUI's output folder. It is made where "
                        f"there is none. {_WHERE}",
                    },
                ),
                "existing": (
                    list(EXISTING),
                    {"default": EXISTING[0], "tooltip": "What to do where a picture has a caption file already."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # the files may have been deleted since

    def save(self, text: list[str], names: list[str], folder: list[str], existing: list[str]) -> dict[str, Any]:
        if len(text) != len(names):
            raise FolderError(
                f"There are {len(text)} texts for {len(names)} names. Set the QwenVL node's image_mode to "
                "'one answer per image', and connect the names that came with its images."
            )
        one_of("existing", first(existing), EXISTING)
        where = paths.resolve("folder", require_text("folder", first(folder)), host.reachable(), host.writing_bases())
        if host.reachable() is not None and host.is_preset_folder(where):
            raise FolderError(
                f"folder: {shown(first(folder))} holds the presets of everybody who uses this ComfyUI, so no node "
                "writes there. Choose another folder."
            )
        files = _caption_files(where, [require_text("names", name) for name in names])
        captions = [text_of("text", caption) for caption in text]
        try:
            make_folder(where)
            written = [_save(file, caption, existing[0]) for file, caption in zip(files, captions, strict=True)]
        except OSError as error:
            raise FolderError(f"folder: captions cannot be written to {str(where)!r} ({error}).") from error
        summary = _summary(where, written)
        if written and all(isinstance(result, LongNameError) for result in written):
            raise FolderError(summary)
        NodeWatch(1).end(summary)
        log.info("%s", summary)
        return {"ui": {"text": [summary]}}


def _listed(
    folder: str, pattern: str, sort: str, limit: int, skip_captioned: bool = False
) -> tuple[Path, list[Path], int]:
    """List the widget's folder: its path, its pictures, and how many were left out because they have a caption."""
    given = {"folder": folder, "pattern": pattern, "sort": sort, "limit": limit, "skip_captioned": skip_captioned}
    declared = QwenVLLoadFolder.INPUT_TYPES()
    valid = checked({**declared["required"], **declared["optional"]}, given)
    folder, pattern, sort, limit, skip_captioned = valid.values()
    roots = host.reachable()
    where = paths.resolve("folder", folder, roots, host.reading_bases())
    # A link in an allowed folder may lead out of it.
    files = [file for file in find_pictures(where, pattern, sort) if paths.is_within(file, roots)]
    if limit < 0:
        raise FolderError(f"limit must be 0 or more, got {limit}.")
    captioned = _captioned(where) & set(files) if skip_captioned else set()
    waiting = [file for file in files if file not in captioned]
    return where, waiting[:limit] if limit else waiting, len(captioned)


def _captioned(where: Path) -> set[Path]:
    """Find the pictures with a caption file; its name depends on all pictures of the folder, so all are looked at."""
    return {picture for picture, file in caption_files(find_pictures(where)).items() if _has_one(file)}


def _has_one(file: Path) -> bool:
    try:
        return is_there(file)
    except LongNameError:  # reported when the caption is written
        return False


def _require_memory(files: list[Path]) -> None:
    """Raise FolderError if the pictures together do not fit in free RAM."""
    needed, free = sum(map(_bytes_of, files)), host.free_ram()
    if needed > free:
        raise FolderError(
            f"folder: {len(files)} pictures need {gigabytes(needed)} of memory together, and {gigabytes(free)} are "
            "free. Set a limit or a pattern, or caption the folder with: python -m qwenvl caption FOLDER."
        )


def _bytes_of(file: Path) -> int:
    try:
        with open_picture(file) as picture:
            return picture.width * picture.height * _BYTES_PER_PIXEL
    except BROKEN_PICTURE:
        return 0  # the picture will be left out


def _save(file: Path, caption: str, existing: str) -> bool | LongNameError:
    """Write a caption: True if written, False if one was kept, the error if the file's name is too long."""
    try:
        if existing == EXISTING[0] and is_there(file):
            return False
        write_whole(file, caption)
    except LongNameError as error:
        log.warning("%s", error)
        return error
    return True


def _summary(where: Path, written: Sequence[bool | LongNameError]) -> str:
    counts = f"{written.count(True)} captions written to {where}, {written.count(False)} were there and stayed"
    failed = [str(result) for result in written if isinstance(result, LongNameError)]
    return f"{counts}; {len(failed)} could not be: {failed[0]}" if failed else counts


def _caption_files(where: Path, names: list[str]) -> list[Path]:
    """Choose the caption file for each picture name; raise FolderError for names that are not plain or not unique."""
    for name in names:
        if not paths.is_plain_name(name, windows=os.name == "nt"):
            raise FolderError(f"names: {shown(name)} is not a file's name. Connect the names of QwenVL Load Folder.")
    pictures = [where / name for name in names]
    if len(set(pictures)) < len(names):
        raise FolderError("names: two pictures have one name, so their captions would be one file.")
    # Other pictures of the folder have captions too, from another prompt or the command line.
    others = find_pictures(where) if where.is_dir() else []
    files = caption_files([*pictures, *others])
    return [files[picture] for picture in pictures]
