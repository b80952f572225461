"""A folder of pictures, start to end: python -m qwenvl caption FOLDER --prompt "Describe this image." """

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import printable
from ..files.locks import FileLock
from ..log import log
from ..media import folder
from ..paths import pasted
from ..prompting import presets
from ..request import Answer, Request
from ..settings import CAPTION
from . import common

# Held while a folder is captioned, and while those below it are.
_LOCK, _LOCK_BELOW = ".qwenvl-captions.lock", ".qwenvl-captions-below.lock"
# tqdm turns the rate over where it is below one; always in this direction, two runs can be compared.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_noinv_fmt}]"


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 every picture has its caption, 1 some have none, 2 an error that stopped it all, 130 cancelled."""
    options = _parser().parse_args(arguments)
    return common.status_of(lambda: _run(options), options)


def _parser() -> argparse.ArgumentParser:
    parser = common.Parser(
        prog="python -m qwenvl caption",
        description="Write a text file beside each picture of a folder. Pictures that have one are passed over, so it "
        "can be stopped at any time and started again.",
    )
    add = parser.add_argument
    add("folder", type=_path, metavar="FOLDER")
    add("--prompt", default="", help="the question about each picture")
    add("--recursive", action="store_true", help="the folders below as well")
    add("--overwrite", action="store_true", help="make new captions where there are some")
    add("--suffix", default=".txt", help="of the text files (default: %(default)s)")
    add("--batch-size", type=_batch_size, metavar="N", help="pictures at a time (default: auto, what fits in memory)")
    add("--jsonl", type=_path, metavar="FILE", help="write the captions of the whole folder into one file as well")
    common.add_flags(parser, CAPTION)
    return parser


def _path(value: str) -> Path:
    return Path(pasted(value))


def _batch_size(value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be auto or a number from 1 on, got {value!r}")
    return int(value)


def _run(options: argparse.Namespace) -> int:
    if not options.prompt.strip() and options.preset == presets.NONE:
        raise folder.FolderError("There is nothing to ask: give --prompt, --preset or both.")
    if options.jsonl and not options.jsonl.parent.is_dir():
        raise folder.FolderError(f"--jsonl: there is no folder {str(options.jsonl.parent)!r}.")
    request = common.request(options, options.prompt, {}, at_once=1)
    pictures = folder.find_pictures(options.folder, recursive=options.recursive)
    if not pictures:
        raise folder.FolderError(f"There is no picture in {str(options.folder)!r} ({', '.join(folder.SUFFIXES)}).")
    captions = folder.caption_files(pictures, options.suffix)
    if options.jsonl and options.jsonl.absolute() in {file.absolute() for pair in captions.items() for file in pair}:
        raise folder.FolderError(f"--jsonl: {str(options.jsonl)!r} is a picture or a caption of the folder.")
    folder.remove_leftovers({picture.parent for picture in pictures})
    turn = _Turn(options.folder, {picture.parent for picture in pictures}, options.recursive)
    outcome = _without_one(captions, options.folder, options.overwrite)
    if outcome.waiting:
        folder.require_writable({captions[picture].parent for picture in outcome.waiting})
        turn.take()
        # A run that has ended just now may have made them.
        outcome = _without_one(captions, options.folder, options.overwrite)
    try:
        if len(outcome.waiting) > len(outcome.failures):
            _write_captions(request, options.batch_size, captions, outcome)
    finally:
        turn.end()
        # After Ctrl-C and errors too.
        if options.jsonl:
            _write_jsonl(options.jsonl, options.folder, captions, outcome.failures)
        outcome.report(had_one=len(pictures) - len(outcome.waiting))
    return common.SOME_FAILED if outcome.failures else common.DONE


def _without_one(captions: dict[Path, Path], root: Path, overwrite: bool) -> Outcome:
    """The pictures that have no caption; one that can have none, as its name is too long, costs itself only."""
    outcome = Outcome([], root)
    for picture, file in captions.items():
        try:
            if folder.is_there(file) and not overwrite:
                continue
        except folder.LongNameError as error:
            outcome.failures[picture] = str(error)
        outcome.waiting.append(picture)
    return outcome


class _Turn:
    """A folder is captioned by one run at a time: two would do all of its pictures twice."""

    def __init__(self, root: Path, folders: Iterable[Path], recursive: bool) -> None:
        root = root.resolve()
        self._locks = [FileLock(root / name) for name in (_LOCK, _LOCK_BELOW)[: 1 + recursive]]
        below = {folder.resolve() for folder in folders} - {root}
        self._others = [*(parent / _LOCK_BELOW for parent in root.parents), *(folder / _LOCK for folder in below)]
        self._root = root

    def take(self) -> None:
        """Raise FolderError where another run captions these pictures; what is left of one that was killed is none."""
        try:
            taken = all(lock.take() for lock in self._locks)
        except OSError as error:
            log.warning("whether another run makes captions in %s cannot be told (%s)", self._root, error.strerror)
            return
        if not taken or any(FileLock(path).is_held() for path in self._others):
            self.end()
            raise folder.FolderError(
                f"Another run is making captions in {str(self._root)!r}. Wait until it has ended, or stop it: "
                "two at once would do every picture twice."
            )

    def end(self) -> None:
        for lock in self._locks:
            lock.release()


@dataclass
class Outcome:
    """What became of the pictures that had no caption."""

    waiting: list[Path]
    root: Path
    written: int = 0
    failures: dict[Path, str] = field(default_factory=dict)

    def report(self, had_one: int) -> None:
        """The pictures without a caption, and why, to standard error; the sum to standard output."""
        for picture, error in self.failures.items():
            name = str(picture.relative_to(self.root))
            common.say(f"no caption: {error if name in error else f'{name}: {error}'}", file=sys.stderr)
        left = len(self.waiting) - self.written - len(self.failures)
        parts = [f"{self.written} captioned", f"{len(self.failures)} not", f"{had_one} had a caption"]
        print(", ".join([*parts, f"{left} left to do"] if left else parts))


def _write_captions(request: Request, batch_size: int | None, captions: dict[Path, Path], outcome: Outcome) -> None:
    """Every caption is on the disk as soon as it is made."""
    # With them comes torch, which takes seconds.
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..loading.cache import ModelCache
    from ..pipeline import caption

    waiting = [picture for picture in outcome.waiting if picture not in outcome.failures]
    with logging_redirect_tqdm(), tqdm(total=len(waiting), unit=" images", bar_format=_BAR) as bar:

        def done(index: int, answer: Answer) -> None:
            if not answer.text:
                failed(index, RuntimeError("the model answered nothing"))
                return
            try:
                folder.write_whole(captions[waiting[index]], answer.text)
            except folder.LongNameError as error:
                failed(index, error)
                return
            outcome.written += 1
            bar.update()

        def failed(index: int, error: Exception) -> None:
            outcome.failures[waiting[index]] = str(error)
            bar.update()

        items = [(str(picture.relative_to(outcome.root)), picture) for picture in waiting]
        caption(request, items, ModelCache(), _BesideBar(bar), batch_size, done, failed)


class _BesideBar:
    """The bar says how far it is, and the files hold what was written. Ctrl-C comes as an exception."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def check(self) -> None: ...

    def stage(self, state: str, **facts: Any) -> None: ...

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None:
        """A download, before the first picture."""
        self._bar.set_postfix_str("" if done == total else printable(text, ""))

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None: ...

    def advance(self, done: int, total: int | None, text: str) -> None: ...

    def end(self, text: str) -> None: ...


def _write_jsonl(file: Path, root: Path, captions: dict[Path, Path], failures: Container[Path]) -> None:
    """A line for each picture that has a caption, from the files: what earlier runs wrote is there too."""
    lines = [
        {"file_name": picture.relative_to(root).as_posix(), "text": text.read_text(encoding="utf-8", errors="replace")}
        for picture, text in captions.items()
        if picture not in failures and text.is_file()
    ]
    folder.write_whole(file, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
