"""Every measurement that needs a GPU: python -m benchmarks.gpu --minutes 13

One line of JSON for each, in the order of what is most worth knowing, printed and written to a file of --results as
soon as it is known: "measured" with its figures, "not measured" with a sentence that says why, "failed" or "timed out"
with what was printed, or "no time left": with --minutes, no line starts that may not end in time. A line that fails
loses itself only. The last line says which came out how; the exit status is the number that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import ROOT, Line, Options
from benchmarks.gpu.lines import lines
from benchmarks.gpu.runner import Runner
from benchmarks.measure import command

FAILURES = ("failed", "timed out")


def main() -> int:
    parser = _parser()
    given = parser.parse_args()
    options = Options(given.device, given.shape, str(given.comfyui.resolve()) if given.comfyui else "")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --device cpu --shape nano only tries the program")
    try:
        wanted = chosen(lines(options), given.lines)
    except ValueError as error:
        parser.error(str(error))
    # If a time limit ends this program, the workers end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    end = started + 60 * given.minutes if given.minutes else float("inf")
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{options.device}-{options.shape}.jsonl"
    how = command("benchmarks.gpu")
    if given.comfyui:
        how = how.replace(str(given.comfyui), "COMFYUI")
    write(file, {"line": "run", "command": how, "date": time.strftime("%Y-%m-%d")})
    by_status: dict[str, list[str]] = {}
    for entry in Runner(options, end).run(wanted):
        write(file, entry)
        by_status.setdefault(entry["status"], []).append(entry["line"])
    write(file, {"line": "all", "seconds": round(time.monotonic() - started, 1), **by_status})
    if left := by_status.get("no time left"):
        print(f"the rest: --lines {','.join(left)}", file=sys.stderr)
    return sum(len(by_status.get(status, [])) for status in FAILURES)


def chosen(found: Sequence[Line], names: str) -> list[Line]:
    """Return the lines that are named, in their own order; all if none is named.

    Raises:
        ValueError: there is no line of that name.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    known = [line.name for line in found]
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"there is no line {unknown[0]!r}; there are: {', '.join(known)}")
    return [line for line in found if not asked or line.name in asked]


def write(file: Path, entry: dict[str, Any]) -> None:
    """Write an entry to the disk and the screen, at once."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(entry) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    print(json.dumps(entry), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="for all together; default: as long as it takes")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    parser.add_argument("--comfyui", type=Path, help="a checkout whose requirements this Python has: lines beside it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=("4b", "nano"), default="4b")
    parser.add_argument("--lines", default="", help="only these, by name, with commas between them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
