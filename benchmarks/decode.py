"""Decode speed of each tier against transformers' generate(), in one run: python -m benchmarks.decode --shape nano

A decode step must read every weight once, so memory bandwidth sets a ceiling: tokens per second cannot exceed the
measured copy bandwidth over the bytes that a step reads. Small models stay far below it because launches, not
bytes, take their time; there the ratio to generate() says more.

Sides take turns, the first round is thrown away, and the figures are medians over the rest with their spread. On one
CPU thread the clock is the process's own time, so that other programs on the machine do not count. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.launches import Launches
from benchmarks.models import SHAPES, build, bytes_per_token, prompt
from qwenvl.decode import Decoder, best_tier
from qwenvl.doctor import copy_bandwidth
from qwenvl.request import Sampling

SAMPLED = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
# A square picture of so many 16-pixel patches a side, and words: about 1,100 tokens for the large models.
PROMPTS = {"nano": (16, 32), "small": (16, 32), "2b": (64, 64), "4b": (64, 64), "8b": (64, 64)}

Side = Callable[[int], None]


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = options.device, getattr(torch, options.dtype)
    model = build(SHAPES[options.shape], device, dtype)
    inputs = prompt(model, *(PROMPTS[options.shape] if options.image_side is None else (options.image_side, 64)))
    length = inputs["input_ids"].shape[1]
    tier = options.tier or best_tier(model)[0]
    decoder = Decoder(model, "sdpa", tier)
    sides = {"ours": _ours(decoder, inputs, options.sampled), "generate": _theirs(model, inputs, options.sampled)}
    if options.static:
        sides["generate, static cache"] = _theirs(model, inputs, options.sampled, cache_implementation="static")
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else _synced_clock(device)
    found = _measure(sides, options.tokens, options.rounds, clock)
    speeds = {name: [each["tokens_per_s"] for each in rounds] for name, rounds in found.items()}
    ceiling = copy_bandwidth(device) / bytes_per_token(model, length + options.tokens // 2)
    ours = statistics.median(speeds["ours"])
    result = {
        "shape": options.shape,
        "device": _device_name(device),
        "dtype": options.dtype,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "tier": tier,
        "sampled": options.sampled,
        "prompt_tokens": length,
        "new_tokens": options.tokens,
        "rounds": options.rounds,
        "tokens_per_s": round(ours, 1),
        "tokens_per_s_range": [round(min(speeds["ours"]), 1), round(max(speeds["ours"]), 1)],
        "generate_tokens_per_s": round(statistics.median(speeds["generate"]), 1),
        "ratio": _ratio(speeds, "generate"),
        "ceiling_tokens_per_s": round(ceiling, 1),
        "ceiling_share": round(ours / ceiling, 3),
        "launches_per_layer": launches_per_layer(model, decoder, inputs),
        "prefill_s": round(statistics.median(each["prefill_s"] for each in found["ours"]), 4),
        "generate_prefill_s": round(statistics.median(each["prefill_s"] for each in found["generate"]), 4),
        "versions": _versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if options.static:
        result["ratio_to_generate_static"] = _ratio(speeds, "generate, static cache")
    if device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))


def launches_per_layer(model: Any, decoder: Decoder, inputs: dict[str, Any]) -> float | None:
    """What one more layer adds to a captured step; None for tiers whose launches are transformers' own."""
    lanes: Any = decoder._lanes
    if decoder.tier != "own step":
        return None
    with torch.inference_mode():
        _, logits = lanes.prefill(inputs, 8, lambda: None, "")
        step, layers = lanes._step, lanes._step._layers
        step._fused_norm = True
        counts = []
        for step._layers in (layers[:1], layers):
            with Launches() as launches:
                lanes.step(logits.argmax(-1), lanes.kv.capacity)
            counts.append(len(launches.names))
    return round((counts[1] - counts[0]) / (len(layers) - 1), 1)


def _measure(sides: dict[str, Side], tokens: int, rounds: int, clock: Callable[[], float]) -> dict[str, list[dict]]:
    """Per side and round: the loop's speed, from a long answer less a short one, and the time of the short one."""
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for counted in [False] + [True] * rounds:
        for name, side in sides.items():
            times = [clock()]
            for count in (1, tokens):
                side(count)
                times.append(clock())
            first, all_ = times[1] - times[0], times[2] - times[1]
            if counted:
                found[name].append({"tokens_per_s": (tokens - 1) / (all_ - first), "prefill_s": first})
    return found


def _ours(decoder: Decoder, inputs: dict[str, Any], sampled: bool) -> Side:
    calls = 0

    def run(tokens: int) -> None:
        nonlocal calls
        calls += 1
        how = {**SAMPLED, "do_sample": True, "seed": 1} if sampled else {"do_sample": False}
        # Another name for the picture each time: the prompt must be computed, as generate() does.
        sampling = Sampling(max_new_tokens=tokens, **how)
        decoder.generate(inputs, sampling, 1 if sampled else None, lambda rows: None, lambda: None, str(calls))

    return run


def _theirs(model: Any, inputs: dict[str, Any], sampled: bool, **more: Any) -> Side:
    how = {**SAMPLED, "do_sample": True} if sampled else {"do_sample": False}

    def run(tokens: int) -> None:
        model.generate(**inputs, max_new_tokens=tokens, **how, **more)

    return run


def _ratio(speeds: dict[str, list[float]], other: str) -> float:
    return round(statistics.median(a / b for a, b in zip(speeds["ours"], speeds[other], strict=True)), 2)


def _synced_clock(device: str) -> Callable[[], float]:
    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def _versions() -> dict[str, str]:
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="nano")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--tier", choices=("own step", "generic step", "generate"), help="default: the best that fits")
    add("--sampled", action="store_true", help="temperature 0.7, top_k 20, top_p 0.8, repetition penalty 1.05")
    add("--static", action="store_true", help="also against generate() with its static cache (compiled on a GPU)")
    add("--tokens", type=int, default=256)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1, help="CPU threads; 0 leaves it to torch")
    add(
        "--image-side",
        type=int,
        help="patches of 16 pixels a side; four are a token",
    )
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


if __name__ == "__main__":
    main()
