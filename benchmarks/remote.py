"""What a question costs beyond the engine's own time, and what several at a time gain: python -m benchmarks.remote

The engine's own time is measured by the simplest client: it sends the same bytes, made beforehand, over a new socket,
and waits for the last byte. Both sides take turns, and the overhead is the median of the differences. It holds reading
and packing the pictures, the event loop, and reading the stream. The CPU time of this process is given beside it,
because the clock also counts other programs. The same difference for a stand-in that answers at once, without a model,
has no engine's noise in it.

`transformers serve` answers questions about pictures one at a time, so several at a time can only hide the client's
share and the gaps between requests: the ceiling is the engine's own rate, which is in the result. The stand-in shows
how the client itself scales: it takes a fixed time for each question and any number at once, so the ceiling is the
number at a time. With --model an engine of custom_models.json is measured in place of the demo model's.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import transformers
from PIL import Image

from benchmarks.captions import draw_pictures
from qwenvl.loading.cache import ModelCache
from qwenvl.media import media
from qwenvl.models import catalog
from qwenvl.pipeline import caption, run
from qwenvl.process import PROCESS
from qwenvl.prompting.watch import NoWatch
from qwenvl.remote import chat
from qwenvl.request import Answer, LoadSpec, Request, Sampling
from tests.support.engine import Served
from tests.support.fault_proxy import Fault, fault_proxy, piece, streamed

AT_A_TIME = (1, 4, 16)
# Seconds that the stand-in takes for a question in the second part.
STAND_IN_S = 0.25


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, _stand_in() as stand_in:
        files = draw_pictures(Path(folder), options.pictures)
        photo = Path(folder) / "photo.png"
        Image.effect_noise((1400, 1000), 60).convert("RGB").save(photo)
        entries = {"stand-in": {"base_url": stand_in.base_url, "model": "stand-in", "max_concurrency": max(AT_A_TIME)}}
        with _engine(options.model, Path(folder), entries) as name:
            result = {
                "engine": name if options.model else "transformers serve, demo model, CPU, 1 thread",
                "overhead_ms": {
                    "text": _overhead(_request(name, "hello"), options.rounds),
                    "picture": _overhead(_request(name, image=files[0]), options.rounds),
                },
                "per_s": _throughput(name, files),
            }
        name = f"stand-in{catalog.SUFFIX}"
        stand_in.otherwise = _answers_after(0.0)
        result["stand_in"] = {
            "overhead_ms": {
                "text": _overhead(_request(name, "hello"), options.rounds),
                "picture": _overhead(_request(name, image=files[0]), options.rounds),
                "photo of 1.4 megapixels": _overhead(_request(name, image=photo), options.rounds),
            }
        }
        stand_in.otherwise = _answers_after(STAND_IN_S)
        result["stand_in"] |= {"seconds_each": STAND_IN_S, "per_s": _throughput(name, files)}
    result |= {
        # If it is higher than the number of cores, other programs ran too, and the times are too long.
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    line = json.dumps(result)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(line + "\n", encoding="utf-8")
    print(line)


@contextmanager
def _stand_in() -> Iterator[Any]:
    with fault_proxy(("127.0.0.1", 1)) as stand_in:
        yield stand_in


@contextmanager
def _engine(model: str, folder: Path, entries: dict[str, Any]) -> Iterator[str]:
    """Yield the listed name of the engine to measure; `entries` are in the list too."""
    own = json.loads(catalog.CUSTOM_MODELS.read_text(encoding="utf-8")) if model else {}
    catalog.CUSTOM_MODELS = folder / "custom_models.json"
    if model:
        entries |= own.get("engines", {})
        catalog.CUSTOM_MODELS.write_text(json.dumps({"engines": entries}), encoding="utf-8")
        yield model
        return
    with Served(catalog.PACK / "demo" / "model", folder / "log.txt") as served:
        entries["demo"] = {
            "base_url": served.base_url,
            "model": served.model,
            "pixels": [4096, 65536],
            "max_concurrency": max(AT_A_TIME),
        }
        catalog.CUSTOM_MODELS.write_text(json.dumps({"engines": entries}), encoding="utf-8")
        yield f"demo{catalog.SUFFIX}"


def _answers_after(seconds: float) -> Fault:
    """Return the behaviour of an engine without a model, which answers after that time."""
    words = [piece(word) for word in ("a", " red", " circle", " on", " a", " blue", " background")]
    usage = {"prompt_tokens": 1, "completion_tokens": len(words)}
    answer = streamed(*words, piece(end="stop"), {"choices": [], "usage": usage}, "[DONE]")

    async def fault(proxy: Any, seen: Any, content: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        writer.write(answer)
        await writer.drain()

    return fault


def _request(name: str, text: str = "Describe this image.", image: Path | None = None) -> Request:
    return Request(
        load=LoadSpec(name),
        text=text,
        system="You are a helpful assistant.",
        images={"image": image} if image else {},
        sampling=Sampling(do_sample=False, max_new_tokens=64),
    )


def _overhead(asked: Request, rounds: int) -> dict[str, float]:
    """Measure milliseconds of the engine alone, and beyond it in wall time and in CPU time of this process."""
    models = ModelCache()
    sides: tuple[Callable[[], Any], ...] = (lambda: run(asked, models, NoWatch()), _bare(asked))
    taken: list[list[tuple[float, float]]] = []
    for _ in range(rounds + 1):
        taken.append([])
        for side in sides:
            start, worked = time.perf_counter(), time.process_time()
            side()
            taken[-1].append((1000 * (time.perf_counter() - start), 1000 * (time.process_time() - worked)))
    differences = [whole - bare for (whole, _), (bare, _) in taken[1:]]
    low, middle, high = statistics.quantiles(differences, n=4)
    figures = {
        "engine": statistics.median(bare for _, (bare, _) in taken[1:]),
        "beyond": middle,
        "beyond_lower_quartile": low,
        "beyond_upper_quartile": high,
        "work_beyond": statistics.median(whole - bare for (_, whole), (_, bare) in taken[1:]),
    }
    print(asked.load.model, asked.text, figures, flush=True)
    return {name: round(value, 1) for name, value in figures.items()}


def _bare(asked: Request) -> Callable[[], Any]:
    """Return a function that sends the same question as bytes made beforehand."""
    engine = catalog.engine(asked.load.model)
    parts = list(chat.shown(engine, asked, media.pictures(asked.images), []))
    body = chat.body(engine, asked, None, parts)
    address = urlsplit(engine.base_url)

    def ask() -> None:
        # The other side's first question has found them out.
        unknown = PROCESS.unknown_fields[(engine.base_url, engine.model)]
        content = json.dumps({name: value for name, value in body.items() if name not in unknown})
        line = http.client.HTTPConnection(address.hostname, address.port)
        line.request("POST", f"{address.path}/chat/completions", content, {"Content-Type": "application/json"})
        response = line.getresponse()
        if response.status != 200:
            raise SystemExit(f"The engine refused: {response.read()[:500]!r}")
        response.read()
        line.close()

    return ask


def _throughput(name: str, files: list[Path]) -> dict[str, Any]:
    """Measure answers per second for each number of questions at a time, and the gain over one at a time."""
    rates, answers = {}, {}
    for count in (1, *AT_A_TIME):  # the first one warms up
        done: dict[int, Answer] = {}
        start = time.perf_counter()
        items = [(file.name, file) for file in files]
        caption(_request(name), items, ModelCache(), NoWatch(), count, done=done.__setitem__)
        rates[count] = len(files) / (time.perf_counter() - start)
        answers[count] = [done[index].text for index in range(len(files))]
        print(f"{name}, {count} at a time: {rates[count]:.1f} answers/s", flush=True)
    return {
        str(count): {
            "answers_per_s": round(rates[count], 1),
            "ratio": round(rates[count] / rates[1], 2),
            "same_answers": answers[count] == answers[1],
        }
        for count in AT_A_TIME
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="an engine's entry, as NAME @ engine (default: the demo model's)")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON line there too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
