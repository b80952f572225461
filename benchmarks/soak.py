"""Many runs of changing kinds in one process, to see whether anything grows: python -m benchmarks.soak

2,000 runs, drawn by mixed.py: one picture, several, one answer per image, a video, text; quantization, attention,
sampling, thinking, release and diagnostics vary, one in ten is cancelled and one in ten refused. Then 200 cancels at
random tokens, each followed by a question whose answer is known. After 100 runs, 1,000, 2,000 and at the end every
model is let go, and what is left is looked at: resident memory, open files, threads, live tensors. Bounds for each are
in levels.py. What is beyond one is an error, as is a run that ended otherwise than it must, or after which more models
were alive than the cache holds: exit status 1. The last line is one JSON object.

On a CPU, oneDNN keeps compiled primitives for up to 1,024 shapes, which takes hundreds of megabytes and hundreds of
runs to fill; these caches are off here (they are not ours, and have an end), so that what grows would be ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
import weakref
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers

from qwenvl.loading.cache import ModelCache
from qwenvl.models.catalog import DEMO
from qwenvl.request import LoadSpec, Request

from .levels import Levels, look, watched_loads
from .mixed import CANCELLED, GREEDY, REFUSED, RIGHT, SYSTEM, UNCHECKED, Mix, Run, Scene, how_it_ended, write_video

# Read by oneDNN and by torch when they are loaded.
NO_PRIMITIVE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if NO_PRIMITIVE_CACHES.items() - os.environ.items():
        command = [sys.executable, "-m", "benchmarks.soak", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **NO_PRIMITIVE_CACHES})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, watched_loads() as alive:
        soak = Soak(options.seed, Path(folder), alive)
        start = time.perf_counter()
        soak.runs(options.runs, _looked_at(options.runs))
        soak.cancels(options.cancels)
        result = {"command": f"python -m benchmarks.soak {' '.join(sys.argv[1:])}".strip(), **_where()}
        result |= {"seconds": round(time.perf_counter() - start), **soak.figures()}
    print(json.dumps(result))
    return 1 if result["wrong"] or result["grown"] or result["runs_with_more_models_alive_than_held"] else 0


class Soak:
    """The runs of one process, what came of them, and what was left.

    Args:
        seed: of all that is drawn.
        folder: for a video.
        alive: of levels.watched_loads.
    """

    def __init__(self, seed: int, folder: Path, alive: list[weakref.ref]) -> None:
        self._draw = random.Random(seed)
        self._mix = Mix(self._draw, write_video(folder / "v.mp4"))
        self._models = ModelCache()
        self._alive = alive
        self._beyond = 0
        self._cancelled = 0
        self.outcomes: Counter[str] = Counter()
        self.levels: dict[int, Levels] = {}

    def runs(self, count: int, looked_at: set[int]) -> None:
        """So many mixed runs; after those whose number is in looked_at everything is let go and looked at."""
        for number in range(1, count + 1):
            self._do(self._mix.next())
            if number in looked_at:
                self._look(number)

    def cancels(self, count: int) -> None:
        """So many cancels at random tokens, each followed by a question whose answer is known."""
        last = self._mix.scene()
        for _ in range(count):
            last = self._cancel_and_ask(last)
        self._look(sum(self.outcomes.values()))

    def figures(self) -> dict[str, object]:
        """All of it, for JSON."""
        first, *later = self.levels.values() or [None]
        grown = [each for levels in later for each in levels.growth(first)] if first else []
        ends = {name: self.outcomes[name] for name in (RIGHT, UNCHECKED, CANCELLED, REFUSED)}
        return {
            "ends": ends,
            "wrong": {name: times for name, times in self.outcomes.items() if name not in ends},
            "cancels_followed_by_a_known_question": self._cancelled,
            "loads": len(self._alive),
            "runs_with_more_models_alive_than_held": self._beyond,
            "levels": {number: asdict(levels) for number, levels in self.levels.items()},
            "grown": grown,
        }

    def _cancel_and_ask(self, last: Scene) -> Scene:
        """Returns the picture that was asked about at the end."""
        scene = self._mix.scene()
        ask = Request(LoadSpec(DEMO), "Describe this image.", SYSTEM, {"image1": scene.image}, sampling=GREEDY)
        self._cancelled += self._do(Run(ask, None, cancel_at=self._draw.randint(0, 7))) == CANCELLED
        # Of the cancelled picture, or of the one before: what is in memory must not be taken for either's whole.
        scene = self._draw.choice([scene, last, self._mix.scene()])
        self._do(Run(replace(ask, images={"image1": scene.image}), (scene.caption,)))
        return scene

    def _look(self, number: int) -> None:
        self._models.clear()
        self.levels[number] = look(self._alive)
        print(number, self.levels[number], flush=True)

    def _do(self, run: Run) -> str:
        ended = how_it_ended(run, self._models)
        self.outcomes[ended] += 1
        self._beyond += sum(each() is not None for each in self._alive) > len(self._models.held)
        return ended


def _looked_at(runs: int) -> set[int]:
    """The hundredth, or the last of the first quarter, from which on nothing may grow; the half; and the last."""
    return {max(1, min(100, runs // 4)), max(1, runs // 2), runs}


def _where() -> dict[str, object]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, one thread",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
