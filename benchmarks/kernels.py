"""Where the time of a decode step goes, kernel by kernel: python -m benchmarks.kernels --shape 4b

Profiles the loop of one answer, after the prefill and the captures, and lists kernels (on a CPU: operators) by their
share of its time. The rest to 1 is time in which the device was idle. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import command, device_name, synced_clock, versions
from benchmarks.models import DECODE, SHAPES, build, prompt
from qwenvl.decoding.decoder import Decoder
from qwenvl.request import Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tier", choices=("own step", "generic step", "generate"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--image-side", type=int, default=64, help="patches of 16 pixels a side; four are a token")
    parser.add_argument("--most", type=int, default=25, help="kernels to list")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    model = build(SHAPES[options.shape], options.device, torch.bfloat16 if cuda else torch.float32)
    inputs = prompt(model, options.image_side, 64)
    decoder = Decoder(model, "sdpa", options.tier, decode=DECODE)
    result = {
        "command": command("benchmarks.kernels"),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(options.device),
        "versions": versions(),
        **by_kernel(decoder, inputs, options.tokens, options.device, options.most),
    }
    print(json.dumps(result))


def by_kernel(decoder: Decoder, inputs: dict[str, Any], tokens: int, device: str, most: int) -> dict[str, Any]:
    """Profile an answer of `tokens` tokens, more than 12, and return where the time of a step goes."""
    cuda = device == "cuda"
    steps, seconds, events = _profiled(decoder, inputs, tokens, synced_clock(device), cuda)
    total = sum(_microseconds(event, cuda) for event in events)
    return {
        "tier": decoder.tier,
        "steps": steps,
        "step_ms": round(1000 * seconds / steps, 4),
        "busy_share": round(total / 1e6 / seconds, 3),
        "kernels_per_step": round(sum(event.count for event in events) / steps, 1),
        "kernels": [
            {
                "name": event.key[:100],
                "per_step": round(event.count / steps, 2),
                "microseconds_each": round(_microseconds(event, cuda) / event.count, 2),
                "share": round(_microseconds(event, cuda) / 1e6 / seconds, 4),
            }
            for event in sorted(events, key=lambda event: -_microseconds(event, cuda))[:most]
        ],
    }


def _profiled(decoder: Decoder, inputs: dict[str, Any], tokens: int, clock: Any, cuda: bool) -> tuple:
    """Return steps, their seconds, and the profiler's events, for the part of an answer after its first tokens."""
    sampling = Sampling(do_sample=False, max_new_tokens=tokens)
    decoder.generate(inputs, sampling, None, lambda rows: None, lambda: None, "first")
    profiler = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
    seen, times = 0, []

    def on_tokens(rows: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 8:
            times.append(clock())
            profiler.start()
        elif seen == tokens - 4:
            times.append(clock())
            profiler.stop()

    decoder.generate(inputs, sampling, None, on_tokens, lambda: None, "second")
    events = [event for event in profiler.key_averages() if _microseconds(event, cuda) > 0]
    return tokens - 12, times[1] - times[0], events


def _microseconds(event: Any, cuda: bool) -> float:
    return event.self_device_time_total if cuda else event.self_cpu_time_total


if __name__ == "__main__":
    main()
