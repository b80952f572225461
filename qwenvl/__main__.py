"""The command line: the nodes' pipeline without ComfyUI. Run: python -m qwenvl --help"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields

from . import catalog
from .cache import ModelCache
from .pipeline import run
from .request import ATTENTIONS, QUANTIZATIONS, RANGES, LoadSpec, Request, Sampling


class TerminalWatch:
    """Writes the text to the terminal as it is made. Ctrl-C cancels."""

    def __init__(self) -> None:
        self._written = 0

    def check(self) -> None:
        """Nothing to ask: the interrupt comes as an exception."""

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        sys.stdout.write(text[self._written :])
        sys.stdout.flush()
        self._written = len(text)

    def advance(self, done: int, total: int | None, text: str) -> None:
        """Nothing to write: answers come whole, from the result."""

    def end(self, text: str) -> None:
        """The text is there already."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 answered, 2 an error that one line on stderr explains, 130 cancelled."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    if options.list_models:
        print("\n".join({**catalog.vision_models(), **catalog.text_models()}))
        return 0
    try:
        run(_request(options), ModelCache(), TerminalWatch())
    except KeyboardInterrupt:
        print()
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwenvl", description="Ask a Qwen model about pictures, a video or text."
    )
    add = parser.add_argument
    add("text", nargs="?", default="", help="the question; - reads it from standard input")
    add("--image", action="append", default=[], metavar="FILE", help="a picture; may be given several times")
    add("--video", default="", metavar="FILE", help="a video")
    add("--system", default="You are a helpful assistant.", help="the system prompt")
    add("--model", default=catalog.DEMO, help="a name of --list-models (default: %(default)s)")
    add("--list-models", action="store_true", help="print the models and exit")
    add("--quantization", choices=QUANTIZATIONS, default="none")
    add("--attention-mode", choices=ATTENTIONS, default="sdpa")
    for parameter in fields(Sampling):
        flag = f"--{parameter.name.replace('_', '-')}"
        if parameter.name in RANGES:
            low, high = RANGES[parameter.name]
            add(
                flag,
                type=type(parameter.default),
                default=parameter.default,
                metavar="N",
                help=f"{low} to {high} (default: %(default)s)",
            )
        else:
            add(flag, action=argparse.BooleanOptionalAction, default=parameter.default)
    add("--verbose", action="store_true", help="print the log: what was loaded, how long it took")
    add("--debug", action="store_true", help="print the whole traceback of an error")
    return parser


def _request(options: argparse.Namespace) -> Request:
    return Request(
        load=LoadSpec(options.model, options.quantization, options.attention_mode),
        text=sys.stdin.read() if options.text == "-" else options.text,
        system=options.system,
        images={f"image{number}": path for number, path in enumerate(options.image, 1)},
        video_path=options.video,
        sampling=Sampling(**{parameter.name: getattr(options, parameter.name) for parameter in fields(Sampling)}),
    )


if __name__ == "__main__":
    sys.exit(main())
