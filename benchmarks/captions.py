"""Pictures per second, one by one against several at a time, in one run: python -m benchmarks.captions --pictures 200

A decode step reads every weight once, for any number of rows, and a small model spends its time on launches, which are
as many for sixteen rows as for one. So batching makes it faster by a factor of at most the number of rows, and less if
the vision tower, which works picture by picture, takes most of the time; its share is in the result.

Pictures are drawn and written to files first. Every side reads the same files, sides take turns, the first round is
thrown away, and the figures are medians over the rest with their spread. The process's own time, which leaves out other
programs, is given too. Answers are greedy, and compared with those one by one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw

from qwenvl.loading.cache import ModelCache
from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import caption, run
from qwenvl.prompting.watch import NoWatch
from qwenvl.request import Answer, LoadSpec, Request, Sampling, Stats

COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black", "gray", "white")
SHAPES = ("circle", "square", "triangle", "diamond")

Side = Callable[[list[Path]], tuple[list[str], Stats]]


@dataclass(frozen=True)
class Round:
    """One round of one side: wall seconds, and CPU seconds of the process with all its threads."""

    seconds: float
    own_seconds: float
    answers: list[str]
    stats: Stats


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    asked = Request(
        load=LoadSpec(options.model),
        text="Describe this image.",
        system="You are a helpful assistant.",
        sampling=Sampling(do_sample=False, max_new_tokens=options.max_new_tokens),
    )
    models = ModelCache()
    with tempfile.TemporaryDirectory() as folder:
        files = draw_pictures(Path(folder), options.pictures)
        sides: dict[str, Side] = {
            "one by one": lambda files: _one_by_one(asked, files, models),
            "batches": lambda files: _in_batches(asked, files, models, options.batch_size),
        }
        found = _measure(sides, files, options.rounds)
    line = json.dumps(_result(options, found))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(line + "\n", encoding="utf-8")
    print(line)


def _result(options: argparse.Namespace, found: dict[str, list[Round]]) -> dict[str, Any]:
    rates = {name: [options.pictures / turn.seconds for turn in rounds] for name, rounds in found.items()}
    ratios = [b / a for a, b in zip(rates["one by one"], rates["batches"], strict=True)]
    own = {name: statistics.median(turn.own_seconds for turn in rounds) for name, rounds in found.items()}
    expected, answers = found["one by one"][0].answers, found["batches"][0].answers
    stats = found["batches"][-1].stats
    return {
        "model": options.model,
        "device": stats.loaded.device,
        "dtype": stats.loaded.dtype,
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "pictures": options.pictures,
        "rounds": options.rounds,
        "batch_size": stats.decode.batch_size,
        "pictures_per_s": round(statistics.median(rates["batches"]), 1),
        "pictures_per_s_range": [round(min(rates["batches"]), 1), round(max(rates["batches"]), 1)],
        "one_by_one_per_s": round(statistics.median(rates["one by one"]), 1),
        "one_by_one_per_s_range": [round(min(rates["one by one"]), 1), round(max(rates["one by one"]), 1)],
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "own_ms_per_picture": round(1000 * own["batches"] / options.pictures, 2),
        "one_by_one_own_ms_per_picture": round(1000 * own["one by one"] / options.pictures, 2),
        "own_ratio": round(own["one by one"] / own["batches"], 2),
        "prefill_share": round(stats.prompt.prefill_s / stats.total_s, 2),
        "same_answers": sum(a == b for a, b in zip(expected, answers, strict=True)),
        "peak_bytes": stats.peak_bytes,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """Draw picture files of several sizes, each a shape of one colour on another."""
    dice = random.Random(0)
    files = []
    for number in range(count):
        color, background = dice.sample(COLORS, 2)
        side = dice.choice((160, 192, 224, 256))
        picture = Image.new("RGB", (side, dice.choice((160, 192, 224, 256))), background)
        _draw(ImageDraw.Draw(picture), dice.choice(SHAPES), color, picture.width / 2, picture.height / 2, 50)
        files.append(folder / f"{number:04}.png")
        picture.save(files[-1])
    return files


def _draw(pen: ImageDraw.ImageDraw, shape: str, color: str, x: float, y: float, r: float) -> None:
    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=color)
    elif shape == "square":
        pen.rectangle([x - r, y - r, x + r, y + r], fill=color)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.82 * r), (x - r, y + 0.82 * r)], fill=color)
    else:
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=color)


def _one_by_one(asked: Request, files: list[Path], models: ModelCache) -> tuple[list[str], Stats]:
    results = [run(replace(asked, images={"image": file}), models, NoWatch()) for file in files]
    return [result.text for result in results], results[-1].stats


def _in_batches(asked: Request, files: list[Path], models: ModelCache, size: int | None) -> tuple[list[str], Stats]:
    answers: dict[int, Answer] = {}
    items = [(file.name, file) for file in files]
    stats = caption(asked, items, models, NoWatch(), size, done=answers.__setitem__)
    if stats is None:
        raise SystemExit("There were no pictures.")
    return [answers[index].text for index in range(len(files))], stats


def _measure(sides: dict[str, Side], files: list[Path], rounds: int) -> dict[str, list[Round]]:
    """Measure all rounds of every side; leave out the first."""
    found: dict[str, list[Round]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start, own = time.perf_counter(), time.process_time()
            answers, stats = side(files)
            turn = Round(time.perf_counter() - start, time.process_time() - own, answers, stats)
            if number:
                found[name].append(turn)
                print(f"round {number}, {name}: {len(files) / turn.seconds:.1f} pictures/s", flush=True)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--batch-size", type=int, help="default: what fits")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch; reading has its own")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON line there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
