"""What the commands of the command line have in common: flags of models and sampling, the log, the exit status."""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from ..checks import printable
from ..log import PrintableFormatter
from ..models import catalog
from ..models.download import default_policy
from ..packages import lack_of_module
from ..prompting import presets
from ..request import Request
from ..settings import AUTO, RESOLUTIONS, SETTINGS, Setting

# "low (256x28x28)" is low here.
_RESOLUTIONS = {name.split()[0]: name for name in RESOLUTIONS}
# The last two are what shells make of an interrupt and of a pipe that nobody reads any more.
DONE, SOME_FAILED, FAILED, CANCELLED, UNREAD = 0, 1, 2, 130, 141
# Ways of Python to write, all of which fail for a character that the encoding has not. Others were chosen by somebody.
_BYTES_OR_ESCAPES = "qwenvl.bytes_or_escapes"
_FAILING = ("strict", "surrogateescape", "surrogatepass")


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """A flag for each setting that the command has, and what is printed besides the answer."""
    # What a setting is on this machine, and on the command line, where that is something else.
    here: dict[str, dict[str, Any]] = {
        "model": {"default": catalog.DEMO},
        "preset": {"default": presets.NONE, "metavar": "NAME"},
        "download": {"default": default_policy()},
        # Which there are takes torch to know.
        "device": {"metavar": "DEVICE", "help": f"{AUTO}, cpu, or a GPU by its name, as cuda:1 (default: %(default)s)"},
        "image_resolution": {"choices": _RESOLUTIONS},
        "stop": {"action": "append", "default": [], "metavar": "TEXT"},
    }
    for setting in SETTINGS.values():
        if command in setting.commands:
            options = {**_flag(setting), **here.get(setting.name, {})}
            parser.add_argument(f"--{setting.name.replace('_', '-')}", **options)
    parser.add_argument("--verbose", action="store_true", help="print the log: what was loaded, how long it took")
    parser.add_argument("--debug", action="store_true", help="print the whole traceback of an error")


def _flag(setting: Setting) -> dict[str, Any]:
    """What argparse is told of a setting. Pure."""
    told: dict[str, Any] = {"default": setting.default, "help": setting.help or None}
    if setting.kind == "BOOLEAN":
        return {**told, "action": argparse.BooleanOptionalAction}
    if setting.span is not None:
        low, high = setting.span
        kind = int if setting.kind == "INT" else float
        return {**told, "type": kind, "metavar": "N", "help": f"{low} to {high} (default: %(default)s)"}
    return {**told, "choices": setting.choices} if setting.choices else told


def request(
    options: argparse.Namespace, question: str, images: Mapping[str, Any], at_once: int | None = None
) -> Request:
    """The request that the flags describe, with the preset around the question.

    Args:
        at_once: how many pictures a question will be about, where they are not among the images.
    """
    system, text = presets.find(options.preset).fill(options.system, question)
    written = {
        "system": system,
        "text": text,
        "stop": tuple(options.stop),
        "image_resolution": _RESOLUTIONS[options.image_resolution],
    }
    made = Request.of({**vars(options), **written}, images)
    presets.require_shown(options.preset, made.pictures_at_once if at_once is None else at_once, made.shows_video)
    return made


def write_every_character() -> None:
    """From now on this process writes what the encoding of its output has not as \\u4e00, in place of failing.

    A code page of Windows and the encoding of a file or a pipe there hold few characters, and an answer may hold any.
    """
    codecs.register_error(_BYTES_OR_ESCAPES, _bytes_or_escapes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _FAILING:
            was_bytes = stream.errors == "surrogateescape"
            stream.reconfigure(errors=_BYTES_OR_ESCAPES if was_bytes else "backslashreplace")


def _bytes_or_escapes(error: UnicodeError) -> tuple[str | bytes, int]:
    """A file's name that Python could not read becomes its bytes again, as before; the rest is escaped."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def tell_of_escapes(text: str) -> None:
    """Say on standard error that what was written is not what was answered, and how it would be."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        print(
            f"note: standard output is {encoding}, which has not every character of the answer: those are written as "
            "\\u4e00. Set PYTHONIOENCODING=utf-8 to have them as they are.",
            file=sys.stderr,
        )


class Parser(argparse.ArgumentParser):
    """What a shell makes of * may be any names."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, ""))


def say(text: str, keep: str = "", **where: Any) -> None:
    """Print it: names of files, models and presets, and what engines say, may hold orders to the terminal.

    Args:
        keep: control characters that stay as they are.
        where: as print takes it.
    """
    print(printable(text, keep), **where)


def status_of(work: Callable[[], int], options: argparse.Namespace) -> int:
    """Do the work with the log that was asked for. Errors become one line on standard error, and a status."""
    talks = options.verbose or options.diagnostics == "full"
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if talks else logging.WARNING, handlers=[handler])
    catalog.keep_own()
    return written(lambda: _without_errors(work, options.debug))


def _without_errors(work: Callable[[], int], debug: bool) -> int:
    try:
        return work()
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print()
        return CANCELLED
    except (ValueError, RuntimeError, OSError) as error:
        if debug:
            raise
        say(f"error: {error}", "\n", file=sys.stderr)
        return FAILED
    except ModuleNotFoundError as error:
        if debug:
            raise
        say(f"error: {lack_of_module(error)}", file=sys.stderr)
        return FAILED


def written(work: Callable[[], int]) -> int:
    """Do the work and write all of its output. Where nobody reads that any more, as behind `| head`, it ends there."""
    try:
        status = work()
    except BrokenPipeError:
        _give_up(sys.stdout)
        _give_up(sys.stderr)
        return UNREAD
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _give_up(sys.stdout)
        if error.errno in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
            return UNREAD
        print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        return FAILED
    return status


def _give_up(stream: TextIO) -> None:
    """Python flushes once more at its end, and would tell of the same failure in a traceback."""
    with suppress(OSError, ValueError):  # it is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
