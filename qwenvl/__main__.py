"""The command line: the nodes' pipeline without ComfyUI. Run: python -m qwenvl --help"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .checks import printable
from .cli import caption, common, parts, serve_info
from .comfyui.host import model_roots
from .models import catalog
from .paths import pasted
from .prompting import presets
from .request import Request
from .settings import ASK

DIM, PLAIN = "\033[2m", "\033[0m"


class TerminalWatch:
    """A watch that writes the answer as it grows, and the thinking before it, dimmed, if standard error is a terminal.

    Ctrl-C cancels.
    """

    def __init__(self) -> None:
        common.write_every_character()
        self._written = self._thought = 0
        self.text = ""

    def check(self) -> None:
        """Do nothing: Ctrl-C comes as an exception."""

    def stage(self, state: str, **facts: Any) -> None:
        """Do nothing: the log reports it."""

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None:
        # On a terminal only: a file would keep every state of the line, and the log has it too.
        if sys.stderr.isatty():
            print(f"\r{printable(text, ''):<79}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        if sys.stderr.isatty() and len(thinking) > self._thought:
            print(f"{DIM}{printable(thinking[self._thought :])}{PLAIN}", end="", file=sys.stderr, flush=True)
            self._thought = len(thinking)
        self.end(text)

    def advance(self, done: int, total: int | None, text: str) -> None:
        """Do nothing: many answers are written together at the end."""

    def end(self, text: str) -> None:
        """Write what is not written yet; to a file as it is, to a terminal with control characters escaped."""
        new = text[self._written :]
        seen = sys.stdout is not None and sys.stdout.isatty()
        print(printable(new) if seen else new, end="", flush=True)
        self._written = max(self._written, len(text))
        self.text = text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0 answered, 2 error (one line on stderr), 130 cancelled, 141 broken pipe."""
    common.write_every_character()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    options = _parser().parse_args(arguments)
    return common.status_of(lambda: _answer(options), options)


def _answer(options: argparse.Namespace) -> int:
    if options.list_models:
        for model in catalog.all_models(model_roots()).values():
            common.say(f"{model.name:<30}  {model.size}" if model.size else model.name)
    elif options.list_presets:
        for name in presets.names():
            common.say(name)
    else:
        # Imported here because they import torch, which takes seconds.
        from .loading.cache import ModelCache
        from .pipeline import run

        watch = TerminalWatch()
        result = run(_request(options), ModelCache(), watch)
        print(flush=True)
        common.note_escapes(watch.text)
        if options.stats:
            common.say(result.stats.to_json(), "\n", file=sys.stderr)
    return common.DONE


def _parser() -> argparse.ArgumentParser:
    parser = common.Parser(
        prog="python -m qwenvl",
        description="Ask a Qwen model about pictures, a video or text.",
        epilog=f"As the first word, {' and '.join(COMMANDS)} are commands: see python -m qwenvl caption --help.",
    )
    add = parser.add_argument
    add("text", nargs="?", default="", help="the question; - reads it from standard input")
    add(
        "--image",
        action="append",
        type=pasted,
        default=[],
        metavar="FILE",
        help="a picture; may be given several times",
    )
    add("--video", dest="video_path", type=pasted, default="", metavar="FILE", help="a video")
    add("--list-models", action="store_true", help="print the models and exit")
    add("--list-presets", action="store_true", help="print the presets and exit")
    add("--stats", action="store_true", help="print the figures of the run as JSON on standard error")
    common.add_flags(parser, ASK)
    return parser


def _request(options: argparse.Namespace) -> Request:
    question = sys.stdin.read() if options.text == "-" else options.text
    return common.request(options, question, {f"image{number}": path for number, path in enumerate(options.image, 1)})


def _doctor(arguments: Sequence[str]) -> int:
    """Run the doctor; exit status 0 if all is well, 1 if something grave was found."""
    parser = common.Parser(prog="python -m qwenvl doctor", description="Report what is slow or missing here.")
    parser.add_argument(
        "--model", default=catalog.DEMO, help="also report what this model lacks (default: %(default)s)"
    )
    model = parser.parse_args(arguments).model
    return common.written(lambda: 0 if parts.examine(model, common.say) else 1)


# First word -> command. A question that is one of these words can be asked after --.
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "caption": caption.main,
    "doctor": _doctor,
    "serve-info": serve_info.main,
}


if __name__ == "__main__":
    sys.exit(main())
