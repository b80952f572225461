"""Many runs of changing kinds in one process, to see whether memory grows: python -m benchmarks.soak --runs 500

Each run draws its settings: picture or text, quantization, attention, sampling, release, and one in ten an error or a
cancel. Resident memory is read after a warm-up of a tenth of the runs and at the end; live models are counted by weak
references after every run and compared with what the cache says it holds. The last line is one JSON object.

On a CPU, oneDNN keeps compiled primitives for up to 1,024 shapes, which takes hundreds of megabytes and hundreds of
runs to fill; these caches are off here (they are not ours, and have an end), so that what grows would be ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import weakref
from collections import Counter
from typing import Any

import psutil
import torch
from PIL import Image, ImageDraw

from qwenvl import loader
from qwenvl.cache import ModelCache
from qwenvl.catalog import DEMO
from qwenvl.media import MediaError
from qwenvl.pipeline import run
from qwenvl.request import RELEASES, LoadSpec, Request, Sampling

# Read by oneDNN and by torch when they are loaded.
NO_PRIMITIVE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}


class Cancel(BaseException):
    """Stands for the user's click."""


class Watch:
    """Cancels at a token, if told to."""

    def __init__(self, cancel_at: int | None) -> None:
        self._cancel_at = cancel_at

    def check(self) -> None: ...

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        if new_tokens == self._cancel_at:
            raise Cancel

    def advance(self, done: int, total: int | None, text: str) -> None: ...

    def end(self, text: str) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if NO_PRIMITIVE_CACHES.items() - os.environ.items():
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.soak", *sys.argv[1:]],
            {**os.environ, **NO_PRIMITIVE_CACHES},
        )
    torch.set_num_threads(1)
    alive = _watch_loads()
    models, draw = ModelCache(), random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    warm_up = max(1, options.runs // 10)
    resident: dict[int, int] = {}
    most = beyond = 0
    start = time.perf_counter()
    for number in range(1, options.runs + 1):
        outcomes[_one(models, draw)] += 1
        living = sum(each() is not None for each in alive)
        most = max(most, living)
        beyond += living > len(models.held)
        if number % warm_up == 0 or number == options.runs:
            resident[number] = psutil.Process().memory_info().rss
    result = {
        "runs": options.runs,
        "seconds": round(time.perf_counter() - start, 1),
        "outcomes": dict(outcomes),
        "errors": outcomes["unexpected error"],
        "loads": len(alive),
        "live_models_max": most,
        "runs_with_more_alive_than_held": beyond,
        "rss_megabytes": {number: round(size / 1e6) for number, size in resident.items()},
        "rss_growth_percent": round(100 * (resident[options.runs] / resident[warm_up] - 1), 2),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result))


def _one(models: ModelCache, draw: random.Random) -> str:
    """One run of a drawn kind; how it ended."""
    kind = draw.choices(["answer", "expected error", "cancel"], [8, 1, 1])[0]
    images: dict[str, Any] = {f"image{i}": _picture(draw) for i in range(1, draw.randint(0, 3) + 1)}
    if kind == "expected error":
        images["image4"] = torch.zeros(0, 8, 8, 3)
    quantization = draw.choices(["none", "4bit", "8bit"], [8, 1, 1])[0]
    attention = draw.choice(["sdpa", "eager", "auto"])
    request = Request(
        load=LoadSpec(DEMO, quantization, attention),
        text=draw.choice(["Describe this image.", "Describe each image.", "hello", "Enhance this prompt: a cat"]),
        system=draw.choice(["", "You are a helpful assistant."]),
        images=images,
        sampling=Sampling(do_sample=draw.random() < 0.5, max_new_tokens=draw.randint(4, 60), seed=draw.randint(-1, 99)),
        release=draw.choices(RELEASES, [8, 1, 1])[0],
    )
    try:
        run(request, models, Watch(draw.randint(1, 3) if kind == "cancel" else None))
    except Cancel:
        return "cancel"
    except MediaError:
        return "expected error"
    except (ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}")
        return "unexpected error"
    return "answer"


def _picture(draw: random.Random) -> torch.Tensor:
    """An IMAGE of a circle, of a drawn size."""
    side, colors = draw.choice([64, 128, 200]), draw.sample(["red", "blue", "green", "yellow", "black", "white"], 2)
    picture = Image.new("RGB", (side, side), colors[0])
    ImageDraw.Draw(picture).ellipse([side // 4, side // 4, 3 * side // 4, 3 * side // 4], fill=colors[1])
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, side, side, 3) / 255


def _watch_loads() -> list[weakref.ref]:
    """Weak references to every model that is loaded from now on."""
    alive: list[weakref.ref] = []
    real = loader.load

    def load(*arguments: Any) -> loader.ModelHandle:
        handle = real(*arguments)
        alive.append(weakref.ref(handle.model))
        return handle

    loader.load = load
    return alive


if __name__ == "__main__":
    main()
