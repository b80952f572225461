"""The command line: the nodes' pipeline without ComfyUI. Run: python -m qwenvl --help"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from . import catalog, doctor
from .cache import ModelCache
from .download import default_policy
from .host import model_roots
from .pipeline import run
from .request import (
    ATTENTIONS,
    DIAGNOSTICS,
    DOWNLOADS,
    FRAME_RANGES,
    IMAGE_MODES,
    QUANTIZATIONS,
    RANGES,
    RESOLUTIONS,
    THINKING,
    Frames,
    LoadSpec,
    Request,
    Sampling,
)

DIM, PLAIN = "\033[2m", "\033[0m"


class TerminalWatch:
    """Writes the answer as it is made, and the thought before it, dimmed, where standard error is a terminal.

    Ctrl-C cancels.
    """

    def __init__(self) -> None:
        self._written = self._thought = 0

    def check(self) -> None:
        """Nothing to ask: the interrupt comes as an exception."""

    def report(self, done: int, total: int, text: str) -> None:
        # On a terminal only: in a file every state of the line would stay, and the log has it too.
        if sys.stderr.isatty():
            print(f"\r{text:<79}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        if sys.stderr.isatty() and len(thinking) > self._thought:
            print(f"{DIM}{thinking[self._thought :]}{PLAIN}", end="", file=sys.stderr, flush=True)
            self._thought = len(thinking)
        self.end(text)

    def advance(self, done: int, total: int | None, text: str) -> None:
        """Nothing to write: many answers come together at the end."""

    def end(self, text: str) -> None:
        """Write what is not written yet."""
        sys.stdout.write(text[self._written :])
        sys.stdout.flush()
        self._written = max(self._written, len(text))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 answered, 2 an error that one line on stderr explains, 130 cancelled."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    options = _parser().parse_args(arguments)
    talks = options.verbose or options.diagnostics == "full"
    logging.basicConfig(level=logging.INFO if talks else logging.WARNING, format="%(message)s")
    if options.list_models:
        for model in catalog.all_models(model_roots()).values():
            print(f"{model.name:<30}  {model.size}" if model.size else model.name)
        return 0
    try:
        result = run(_request(options), ModelCache(), TerminalWatch())
    except KeyboardInterrupt:
        print()
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    if options.stats:
        print(result.stats.to_json(), file=sys.stderr)
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
    add(
        "--download", choices=DOWNLOADS, default=default_policy(), help="whether a model that is missing may be fetched"
    )
    add("--quantization", choices=QUANTIZATIONS, default="none")
    add("--attention-mode", choices=ATTENTIONS, default="sdpa")
    add("--image-mode", choices=IMAGE_MODES, default=IMAGE_MODES[0])
    add("--image-resolution", choices=RESOLUTIONS, default="auto")
    add("--thinking", choices=THINKING, default="auto")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be given several times")
    add("--do-sample", action=argparse.BooleanOptionalAction, default=Sampling().do_sample)
    defaults = {**asdict(Sampling()), **asdict(Frames())}
    for name, (low, high) in {**RANGES, **FRAME_RANGES}.items():
        add(
            f"--{name.replace('_', '-')}",
            type=type(defaults[name]),
            default=defaults[name],
            metavar="N",
            help=f"{low} to {high} (default: %(default)s)",
        )
    add("--diagnostics", choices=DIAGNOSTICS, default=DIAGNOSTICS[0], help="how much a run tells of itself in the log")
    add("--stats", action="store_true", help="print the figures of the run as JSON on standard error")
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
        download=options.download,
        sampling=_settings(Sampling, options),
        frames=_settings(Frames, options),
        image_mode=options.image_mode,
        image_resolution=options.image_resolution,
        thinking=options.thinking,
        diagnostics=options.diagnostics,
    )


def _settings(kind: type, options: argparse.Namespace) -> Any:
    """A Sampling or Frames from the flags that are called like its fields."""
    values = {field.name: getattr(options, field.name) for field in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _doctor(arguments: Sequence[str]) -> int:
    """Exit status: 0 all is well, 1 something grave was found."""
    parser = argparse.ArgumentParser(prog="python -m qwenvl doctor", description="Tell what is slow or missing here.")
    parser.add_argument("--model", default=catalog.DEMO, help="also tell what this one lacks (default: %(default)s)")
    return 0 if doctor.examine(parser.parse_args(arguments).model, print) else 1


# Commands by the first word; a question that is one of these words can be asked after --.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"doctor": _doctor}


if __name__ == "__main__":
    sys.exit(main())
