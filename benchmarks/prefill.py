"""The time to the first token for a prompt with one picture, against generate(): python -m benchmarks.prefill

Three sides take turns in one run: ours; generate() with the patch embedding as a matrix product, as the pack loads it;
and generate() with it as a convolution, as transformers has it, which some builds of torch and cuDNN run 10 to 20 times
too slowly. The patch embedding is timed by itself as well. The default picture has 1 megapixel. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.measure import command, device_name, synced_clock, versions
from benchmarks.models import DECODE, SHAPES, build, prompt
from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.patch_embedding import patch_embedding_as_matmul
from qwenvl.request import Sampling

Clock = Callable[[], float]
ONE = Sampling(do_sample=False, max_new_tokens=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--image-side", type=int, default=64, help="patches of 16 pixels a side")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = build(SHAPES[options.shape], options.device, getattr(torch, options.dtype))
    inputs = prompt(model, options.image_side, 64)
    convolution = patch_embedding(model).proj
    patch_embedding_as_matmul(model)
    decoder = Decoder(model, "sdpa", decode=DECODE)
    result = {
        "command": command("benchmarks.prefill"),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(options.device),
        "versions": versions(),
        "shape": options.shape,
        "dtype": options.dtype,
        "picture_pixels": (16 * options.image_side) ** 2,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "rounds": options.rounds,
        **first_token(decoder, model, convolution, inputs, synced_clock(options.device), options.rounds),
    }
    print(json.dumps(result))


def patch_embedding(model: Any) -> Any:
    """Return the vision tower's module that reads pixels."""
    return next(module for name, module in model.named_modules() if name.endswith("patch_embed"))


def first_token(
    decoder: Decoder, model: Any, convolution: Any, inputs: dict[str, Any], clock: Clock, rounds: int
) -> dict[str, Any]:
    """Measure each side's seconds to the first token, and those within the patch embedding.

    Args:
        model: its patch embedding is a matrix product, and is one again afterwards.
        convolution: the patch embedding as transformers has it.
    """
    embed = patch_embedding(model)
    product = embed.proj
    projections = {"ours": product, "generate, matrix product": product, "generate, convolution": convolution}
    times: dict[str, list[float]] = {name: [] for name in projections}
    embedding: dict[str, list[float]] = {name: [] for name in projections}
    try:
        for counted in [False] + [True] * rounds:
            for name, embed.proj in projections.items():
                found, within = _timed(name, model, decoder, inputs, embed, clock)
                if counted:
                    times[name].append(found)
                    embedding[name].append(within)
    finally:
        embed.proj = product
    return {
        "prefill_s": _median(times, 4),
        "prefill_s_range": {name: [round(pick(seconds), 4) for pick in (min, max)] for name, seconds in times.items()},
        "patch_embedding_s": _median(embedding, 6),
    }


def _timed(name: str, model: Any, decoder: Decoder, inputs: dict[str, Any], embed: Any, clock: Any) -> tuple:
    """Return seconds to the first token, and in a second run those within the patch embedding."""

    def run() -> None:
        if name == "ours":
            # A new name for the picture each time, so that it is computed anew.
            decoder.generate(inputs, ONE, None, lambda rows: None, lambda: None, str(time.perf_counter()))
        else:
            model.generate(**inputs, do_sample=False, max_new_tokens=1)

    start = clock()
    run()
    total = clock() - start
    with _watched(embed, clock) as looks:
        run()
    return total, looks[1] - looks[0]


@contextmanager
def _watched(module: Any, clock: Any) -> Iterator[list[float]]:
    looks: list[float] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: looks.append(clock())),
        module.register_forward_hook(lambda *_: looks.append(clock())),
    ]
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


def _median(found: dict[str, list[float]], digits: int) -> dict[str, float]:
    return {name: round(statistics.median(values), digits) for name, values in found.items()}


if __name__ == "__main__":
    main()
