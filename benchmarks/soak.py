"""Many runs of changing kinds in one process, to see if anything grows: python -m benchmarks.soak

2,000 runs, drawn by mixed.py: one picture, several, one answer per image, a video, text; quantization, attention,
sampling, thinking, release and diagnostics vary, one in ten is cancelled and one in ten refused. Then 200 cancels at
random tokens, each followed by a question whose answer is known. After 100 runs, 1,000, 2,000 and at the end every
model is released, and the rest is measured: resident memory, open files, threads, live tensors. levels.py has the
bounds. The exit status is 1 if a bound is exceeded, a run ended in a wrong way, or more models were alive after a run
than the cache holds. The last line is one JSON object.

On a CPU, oneDNN keeps compiled primitives for up to 1,024 shapes, which takes hundreds of megabytes and hundreds of
runs to fill. These caches, which are not ours and are bounded, are off here, so that any growth is ours.
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
    """The runs of one process, their outcomes, and the levels after them.

    Args:
        seed: seed of all random numbers.
        folder: a folder for the video.
        alive: the list that levels.watched_loads yields.
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
        """Do `count` mixed runs; after those in `looked_at`, release all models and measure the levels."""
        for number in range(1, count + 1):
            self._do(self._mix.next())
            if number in looked_at:
                self._look(number)

    def cancels(self, count: int) -> None:
        """Do `count` cancels at random tokens, each followed by a question whose answer is known."""
        last = self._mix.scene()
        for _ in range(count):
            last = self._cancel_and_ask(last)
        self._look(sum(self.outcomes.values()))

    def figures(self) -> dict[str, object]:
        """Return all figures, for JSON."""
        first, *later = self.levels.values() or [None]
        grown = [sentence for levels in later for sentence in levels.growth(first)] if first else []
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
        """Cancel a run, then ask a question with a known answer; return the scene of that question."""
        scene = self._mix.scene()
        ask = Request(LoadSpec(DEMO), "Describe this image.", SYSTEM, {"image1": scene.image}, sampling=GREEDY)
        self._cancelled += self._do(Run(ask, None, cancel_at=self._draw.randint(0, 7))) == CANCELLED
        # Perhaps the cancelled picture or the one before: what is left in memory must not count as complete for either.
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
        self._beyond += sum(model() is not None for model in self._alive) > len(self._models.held)
        return ended


def _looked_at(runs: int) -> set[int]:
    """Return the runs to measure after: the 100th (or a quarter), from which nothing may grow; the half; the last."""
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
