"""Code shared by the commands of the command line: flags of models and sampling, the log, the exit status."""

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

# On the command line, "low (256x28x28)" is called low.
_RESOLUTIONS = {name.split()[0]: name for name in RESOLUTIONS}
# Exit statuses. The last two are those that shells give an interrupt and a broken pipe.
DONE, SOME_FAILED, FAILED, CANCELLED, UNREAD = 0, 1, 2, 130, 141
# Error handlers of Python that fail on characters the encoding lacks. Any other one was chosen by the user.
_BYTES_OR_ESCAPES = "qwenvl.bytes_or_escapes"
_FAILING = ("strict", "surrogateescape", "surrogatepass")


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """Add a flag for each setting of the command, and --verbose and --debug."""
    # What differs from the setting's declaration on this machine and on the command line.
    here: dict[str, dict[str, Any]] = {
        "model": {"default": catalog.DEMO},
        "preset": {"default": presets.NONE, "metavar": "NAME"},
        "download": {"default": default_policy()},
        # No choices: listing the devices would import torch.
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
    """Build the options of add_argument for a setting. Pure."""
    options: dict[str, Any] = {"default": setting.default, "help": setting.help or None}
    if setting.kind == "BOOLEAN":
        return {**options, "action": argparse.BooleanOptionalAction}
    if setting.span is not None:
        low, high = setting.span
        kind = int if setting.kind == "INT" else float
        return {**options, "type": kind, "metavar": "N", "help": f"{low} to {high} (default: %(default)s)"}
    return {**options, "choices": setting.choices} if setting.choices else options


def request(
    options: argparse.Namespace, question: str, images: Mapping[str, Any], at_once: int | None = None
) -> Request:
    """Build the request that the flags describe, with the preset around the question.

    Args:
        at_once: the number of pictures of a question, if they are not among the images.
    """
    system, text = presets.find(options.preset).fill(options.system, question)
    written = {
        "system": system,
        "text": text,
        "stop": tuple(options.stop),
        "image_resolution": _RESOLUTIONS[options.image_resolution],
    }
    asked = Request.of({**vars(options), **written}, images)
    presets.require_shown(options.preset, asked.pictures_at_once if at_once is None else at_once, asked.shows_video)
    return asked


def write_every_character() -> None:
    """Have this process write characters that its output encoding lacks as \\u4e00, instead of failing.

    On Windows, consoles, files and pipes often have an encoding of few characters, and an answer may hold any.
    """
    codecs.register_error(_BYTES_OR_ESCAPES, _bytes_or_escapes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _FAILING:
            was_bytes = stream.errors == "surrogateescape"
            stream.reconfigure(errors=_BYTES_OR_ESCAPES if was_bytes else "backslashreplace")


def _bytes_or_escapes(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write a file name that Python could not decode as its bytes, like surrogateescape; escape everything else."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def note_escapes(text: str) -> None:
    """Print a note on standard error if characters of the answer were written as escapes, and how to avoid it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        print(
            f"note: standard output is {encoding}, which lacks some characters of the answer: they are written as "
            "\\u4e00. Set PYTHONIOENCODING=utf-8 to have them as they are.",
            file=sys.stderr,
        )


class Parser(argparse.ArgumentParser):
    """An argument parser that escapes its errors: they repeat file names that the shell expanded from *."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, ""))


def say(text: str, keep: str = "", **where: Any) -> None:
    """Print a text escaped: names of files and models and messages of engines may hold control characters.

    Args:
        keep: control characters that stay as they are.
        where: keyword arguments of print.
    """
    print(printable(text, keep), **where)


def status_of(work: Callable[[], int], options: argparse.Namespace) -> int:
    """Do the work with the log that the options ask for; return its status. An error becomes one line and a status."""
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
    """Do the work and flush its output; return UNREAD if the reader is gone, as behind `| head`."""
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
    """Redirect the stream to nowhere: Python flushes it at exit, and would print a traceback of the same failure."""
    with suppress(OSError, ValueError):  # the stream has no file descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
