"""What the commands of the command line have in common: flags of models and sampling, the log, the exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ..checks import printable
from ..loading.devices import device_choices
from ..log import PrintableFormatter
from ..models import catalog
from ..models.download import default_policy
from ..prompting import presets
from ..request import Request
from ..settings import RESOLUTIONS, SETTINGS, Setting

# "low (256x28x28)" is low here.
_RESOLUTIONS = {name.split()[0]: name for name in RESOLUTIONS}
DONE, SOME_FAILED, FAILED, CANCELLED = 0, 1, 2, 130


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """A flag for each setting that the command has, and what is printed besides the answer."""
    # What a setting is on this machine, and on the command line, where that is something else.
    here: dict[str, dict[str, Any]] = {
        "model": {"default": catalog.DEMO},
        "preset": {"default": presets.NONE, "metavar": "NAME"},
        "download": {"default": default_policy()},
        "device": {"choices": device_choices()},
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


def request(options: argparse.Namespace, question: str, images: Mapping[str, Any]) -> Request:
    """The request that the flags describe, with the preset around the question."""
    system, text = presets.find(options.preset).fill(options.system, question)
    written = {
        "system": system,
        "text": text,
        "stop": tuple(options.stop),
        "image_resolution": _RESOLUTIONS[options.image_resolution],
    }
    return Request.of({**vars(options), **written}, images)


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
    try:
        return work()
    except KeyboardInterrupt:
        print()
        return CANCELLED
    except (ValueError, RuntimeError, OSError) as error:
        if options.debug:
            raise
        say(f"error: {error}", "\n", file=sys.stderr)
        return FAILED
