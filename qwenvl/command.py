"""What the commands of the command line have in common: flags of models and sampling, the log, the exit status."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from . import catalog, presets
from .devices import device_choices
from .download import default_policy
from .request import (
    AS_SET,
    ATTENTIONS,
    AUTO,
    DIAGNOSTICS,
    DOWNLOADS,
    QUANTIZATIONS,
    RANGES,
    RESOLUTIONS,
    SAMPLING_FROM,
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
    add(
        "--download", choices=DOWNLOADS, default=default_policy(), help="whether a model that is missing may be fetched"
    )
    add("--quantization", choices=QUANTIZATIONS, default="none")
    add("--attention-mode", choices=ATTENTIONS, default="sdpa")
    add("--device", choices=device_choices(), default=AUTO, help="where the model runs")
    add("--image-resolution", choices=_RESOLUTIONS, default="auto", help="what pictures are scaled to")
    add("--thinking", choices=THINKING, default=THINKING[0], help="whether the model thinks before it answers")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be given several times")
    add("--do-sample", action=argparse.BooleanOptionalAction, default=Sampling().do_sample)
    add_numbers(parser, RANGES, asdict(Sampling()))
    add("--sampling", choices=SAMPLING_FROM, default=AS_SET, help="whose sampling parameters are used")
    add("--diagnostics", choices=DIAGNOSTICS, default=DIAGNOSTICS[0], help="how much a run tells of itself in the log")
    add("--verbose", action="store_true", help="print the log: what was loaded, how long it took")
    add("--debug", action="store_true", help="print the whole traceback of an error")


def add_numbers(
    parser: argparse.ArgumentParser, ranges: Mapping[str, tuple[float, float]], defaults: Mapping[str, Any]
) -> None:
    """A flag for each of the ranges."""
    for name, (low, high) in ranges.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(defaults[name]),
            default=defaults[name],
            metavar="N",
            help=f"{low} to {high} (default: %(default)s)",
        )


def request(options: argparse.Namespace, question: str, **about: Any) -> Request:
    """The request that the flags describe, with the preset around the question."""
    system, text = presets.find(options.preset).fill(options.system, question)
    return Request(
        load=LoadSpec(options.model, options.quantization, options.attention_mode, options.device),
        text=text,
        system=system,
        sampling=Sampling(
            do_sample=options.do_sample,
            stop=tuple(options.stop),
            **{name: getattr(options, name) for name in RANGES},
        ),
        image_resolution=_RESOLUTIONS[options.image_resolution],
        thinking=options.thinking,
        sampling_from=options.sampling,
        download=options.download,
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
