"""The second question about a picture, and what it costs beside the decoder: python -m benchmarks.again [--before DIR]

A picture and a film, both as ComfyUI's tensors, are asked about again and again in other words, so that their keys and
values are still there. Measured is the processor time of the whole run less that of the decoder, and the time of the
fingerprint of the frames of a film. DIR is another checkout, such as of an earlier commit: its runs take turns with
ours in this process, and figures are medians over the rounds. The ceiling is the time to hash the tensor, which cannot
be left out, since other nodes change tensors in place. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import command, device_name, versions

HERE = Path(__file__).resolve().parent.parent
TEXTS = ("Describe this image.", "Which shape is it?", "What is the background?")


class Pack:
    """The pack of one checkout, imported under a name of its own, with the demo model in memory."""

    def __init__(self, name: str, folder: Path) -> None:
        where = folder / "qwenvl" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, where, submodule_search_locations=[str(where.parent)])
        if spec is None or spec.loader is None:
            raise FileNotFoundError(where)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._name, self._folder = name, where.parent
        self._models = self.part("loading.cache").ModelCache()
        self._decoder_s = 0.0
        self._watch_decoder(self.part("decoding.decoder").Decoder)

    def part(self, name: str) -> Any:
        """Import a module of the pack."""
        return importlib.import_module(f"{self._name}.{name}")

    def _watch_decoder(self, decoder: Any) -> None:
        real = decoder.generate

        def generate(*given: Any, **how: Any) -> Any:
            start = time.process_time()
            try:
                return real(*given, **how)
            finally:
                self._decoder_s += time.process_time() - start

        decoder.generate = generate

    def ask(self, text: str, **shown: Any) -> float:
        """Return the milliseconds of a run beside the decoder."""
        request = self.part("request")
        asked = request.Request(
            request.LoadSpec(self.part("models.catalog").DEMO),
            text,
            sampling=request.Sampling(do_sample=False, max_new_tokens=8),
            # As large as pictures are shown to all models but the demo model, which was made for smaller ones.
            image_resolution="ultra (1024x28x28)",
            **shown,
        )
        self._decoder_s, start = 0.0, time.process_time()
        result = self.part("pipeline").run(asked, self._models, self.part("prompting.watch").Nobody())
        seconds = time.process_time() - start - self._decoder_s
        if result.stats.prompt.reused_tokens == 0 and text != TEXTS[0]:
            raise RuntimeError("nothing was still there from the question before")
        return 1000 * seconds

    def fingerprint(self, frames: np.ndarray) -> float:
        """Return the milliseconds of the fingerprint of a film with these frames."""
        film = self.part("media.films").Video(frames, tuple(map(float, range(len(frames)))), float(len(frames)))
        # Earlier commits have it in media.py.
        where = next(name for name in ("content", "media") if (self._folder / "media" / f"{name}.py").is_file())
        fingerprint = self.part(f"media.{where}").fingerprint
        start = time.process_time()
        fingerprint((), [film])
        return 1000 * (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--side", type=int, default=1024, help="of the picture, in pixels")
    parser.add_argument("--film-mb", type=int, default=50, help="bytes of the film of which the fingerprint is taken")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    packs = {"now": Pack("now", HERE)}
    if options.before:
        packs["before"] = Pack("before", options.before.resolve())
    found = measure(packs, cases(options.side, options.film_mb * 1_000_000), options.rounds)
    result = {
        "command": command("benchmarks.again"),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name("cpu"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "side": options.side,
        "film_bytes": options.film_mb * 1_000_000,
        "rounds": options.rounds,
        "ms": {name: {pack: summary(values) for pack, values in sides.items()} for name, sides in found.items()},
    }
    print(json.dumps(result))


def cases(side: int, film_bytes: int) -> dict[str, Callable[[Pack, int], float]]:
    """Return what is measured: a function of the pack and the round, which returns milliseconds."""
    random = np.random.default_rng(0)
    picture = torch.from_numpy(random.random((1, side, side, 3), np.float32))
    clip = torch.from_numpy(random.random((8, side // 2, side // 2, 3), np.float32))
    frames = random.integers(0, 256, (film_bytes // (768 * 784 * 3), 784, 768, 3), np.uint8)
    channels_first = picture.movedim(-1, 1).contiguous().movedim(1, -1)

    def asked(**shown: Any) -> Callable[[Pack, int], float]:
        def ask(pack: Pack, number: int) -> float:
            if number == 0:
                pack.ask(TEXTS[0], **shown)
            return pack.ask(TEXTS[1 + number % 2], **shown)

        return ask

    def first(pack: Pack, number: int) -> float:
        return pack.ask(TEXTS[0], images={"image1": picture + number / 1e4})

    return {
        "first question about a picture": first,
        "second question about a picture": asked(images={"image1": picture}),
        "the same, channels first, as a VAE gives it": asked(images={"image1": channels_first}),
        "second question about an IMAGE batch as a film": asked(video_frames=clip),
        "fingerprint of a film": lambda pack, number: pack.fingerprint(frames),
    }


def measure(
    packs: dict[str, Pack], found: dict[str, Callable[[Pack, int], float]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Measure every case, the packs in turns; the first round is thrown away."""
    figures: dict[str, dict[str, list[float]]] = {}
    for name, case in found.items():
        turns = [{pack: case(each, number) for pack, each in packs.items()} for number in range(rounds + 1)]
        figures[name] = {pack: [turn[pack] for turn in turns[1:]] for pack in packs}
    return figures


def summary(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 1) for name, value in named.items()}


if __name__ == "__main__":
    main()
