"""What the commands of the command line have in common: flags of models and sampling, the log, the exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

from . import catalog, presets
from .request import (
    ATTENTIONS,
    DIAGNOSTICS,
    QUANTIZATIONS,
    RANGES,
    RESOLUTIONS,
    SYSTEM_PROMPT,
    THINKING,
    LoadSpec,
    Request,
    Sampling,
)

# "low (256x28x28)" is low here.
_RESOLUTIONS = {name.split()[0]: name for name in RESOLUTIONS}
DONE, SOME_FAILED, FAILED, CANCELLED = 0, 1, 2, 130


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Everything that a request holds besides the question and what it is about."""
    add = parser.add_argument
    add("--system", default=SYSTEM_PROMPT, help="the system prompt")
    add("--preset", default=presets.NONE, metavar="NAME", help="a name of --list-presets, put around the question")
    add("--model", default=catalog.DEMO, help="a name of --list-models (default: %(default)s)")
    add("--quantization", choices=QUANTIZATIONS, default="none")
    add("--attention-mode", choices=ATTENTIONS, default="sdpa")
    add("--image-resolution", choices=_RESOLUTIONS, default="auto", help="what pictures are scaled to")
    add("--thinking", choices=THINKING, default=THINKING[0], help="whether the model thinks before it answers")
    for parameter in fields(Sampling):
        _add_sampling(parser, parameter)
    add("--diagnostics", choices=DIAGNOSTICS, default=DIAGNOSTICS[0], help="how much a run tells of itself in the log")
    add("--verbose", action="store_true", help="print the log: what was loaded, how long it took")
    add("--debug", action="store_true", help="print the whole traceback of an error")


def _add_sampling(parser: argparse.ArgumentParser, parameter: Field) -> None:
    flag, default = f"--{parameter.name.replace('_', '-')}", parameter.default
    how: dict[str, Any] = {"default": default, "action": argparse.BooleanOptionalAction}
    if parameter.name in RANGES:
        low, high = RANGES[parameter.name]
        how = {
            "default": default,
            "type": type(default),
            "metavar": "N",
            "help": f"{low} to {high} (default: %(default)s)",
        }
    elif parameter.name == "stop":
        how = {
            "action": "append",
            "default": [],
            "metavar": "TEXT",
            "help": "end the answer before it; may be repeated",
        }
    parser.add_argument(flag, **how)


def request(options: argparse.Namespace, question: str, **about: Any) -> Request:
    """The request that the flags describe, with the preset around the question."""
    system, text = presets.find(options.preset).fill(options.system, question)
    sampling = {parameter.name: getattr(options, parameter.name) for parameter in fields(Sampling)}
    return Request(
        load=LoadSpec(options.model, options.quantization, options.attention_mode),
        text=text,
        system=system,
        sampling=Sampling(**{**sampling, "stop": tuple(options.stop)}),
        image_resolution=_RESOLUTIONS[options.image_resolution],
        thinking=options.thinking,
        diagnostics=options.diagnostics,
        **about,
    )


def status_of(work: Callable[[], int], options: argparse.Namespace) -> int:
    """Do the work with the log that was asked for. Errors become one line on standard error, and a status."""
    talks = options.verbose or options.diagnostics == "full"
    logging.basicConfig(level=logging.INFO if talks else logging.WARNING, format="%(message)s")
    try:
        return work()
    except KeyboardInterrupt:
        print()
        return CANCELLED
    except (ValueError, RuntimeError, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED
