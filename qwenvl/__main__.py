"""The command line: the nodes' pipeline without ComfyUI. Run: python -m qwenvl --help"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields

from . import catalog, doctor
from .cache import ModelCache
from .pipeline import run
from .request import ATTENTIONS, DIAGNOSTICS, QUANTIZATIONS, RANGES, LoadSpec, Request, Sampling


class TerminalWatch:
    """Writes the text to the terminal as it is made. Ctrl-C cancels."""

    def __init__(self) -> None:
        self._written = 0

    def check(self) -> None:
        """Nothing to ask: the interrupt comes as an exception."""

    def update(self, new_tokens: int, text: str) -> None:
        sys.stdout.write(text[self._written :])
        sys.stdout.flush()
        self._written = len(text)

    def end(self, text: str) -> None:
        """The text is there already."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 answered, 2 an error that one line on stderr explains, 130 cancelled."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    options = _parser().parse_args(arguments)
    talks = options.verbose or options.diagnostics == "full"
    logging.basicConfig(level=logging.INFO if talks else logging.WARNING, format="%(message)s")
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
        prog="python -m qwenvl",
        description="Ask a Qwen model about pictures, a video or text.",
        epilog=f"As the first word, {' and '.join(COMMANDS)} is a command: see python -m qwenvl doctor --help.",
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
    add("--diagnostics", choices=DIAGNOSTICS, default=DIAGNOSTICS[0], help="how much a run tells of itself in the log")
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
        diagnostics=options.diagnostics,
    )


def _doctor(arguments: Sequence[str]) -> int:
    """Exit status: 0 all is well, 1 something grave was found."""
    parser = argparse.ArgumentParser(prog="python -m qwenvl doctor", description="Tell what is slow or missing here.")
    parser.add_argument("--model", default=catalog.DEMO, help="also tell what this one lacks (default: %(default)s)")
    return 0 if doctor.examine(parser.parse_args(arguments).model, print) else 1


# Commands by the first word; a question that is one of these words can be asked after --.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"doctor": _doctor}


if __name__ == "__main__":
    sys.exit(main())
