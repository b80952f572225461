"""Many answers in a row: does any token come late, does memory grow? python -m benchmarks.steady --shape 4b --runs 20

Every answer is to a new picture, sampled with a seed of its own. The first run, in which steps are captured, is thrown
away. The interval between two tokens is what a reader of the live text sees. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time

import torch

from benchmarks.measure import command, device_name, versions
from benchmarks.models import DECODE, SHAPES, build, prompt
from qwenvl.decoding.decoder import Decoder
from qwenvl.request import Sampling

DRAWN = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    model = build(SHAPES[options.shape], options.device, torch.bfloat16 if cuda else torch.float32)
    decoder = Decoder(model, "sdpa", decode=DECODE)
    prompts = [prompt(model, side, 64) for side in ((60, 64, 56, 62) if options.shape != "nano" else (16, 12, 14, 10))]
    intervals: list[float] = []
    largest, held = [], []
    for number in range(options.runs + 1):
        came: list[float] = []
        sampling = Sampling(max_new_tokens=options.tokens, **DRAWN)
        inputs = prompts[number % len(prompts)]
        on_tokens = lambda rows, came=came: came.append(time.perf_counter())  # noqa: E731
        decoder.generate(inputs, sampling, number, on_tokens, lambda: None, str(number))
        if number:
            # The first token belongs to the prefill.
            between = [b - a for a, b in itertools.pairwise(came[1:])]
            intervals += between
            largest.append(max(between))
        if cuda:
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated())
    median = statistics.median(intervals)
    result = {
        "command": command("benchmarks.steady"),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(options.device),
        "versions": versions(),
        "tier": decoder.tier,
        "runs": options.runs,
        "median_interval_s": round(median, 6),
        "largest_interval_s": round(max(intervals), 6),
        "largest_over_median": round(max(intervals) / median, 2),
        "largest_over_median_by_run": [round(interval / median, 2) for interval in largest],
        "held_bytes_after_run": held,
        "growth_bytes": held[-1] - held[min(len(prompts), options.runs)] if held else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
