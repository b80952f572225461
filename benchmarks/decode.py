"""Decode speed of each tier against transformers' generate(), in one run: python -m benchmarks.decode --shape nano

A decode step must read every weight once, so memory bandwidth sets a ceiling: tokens per second cannot exceed the
measured copy bandwidth over the bytes that a step reads. Small models stay far below it because their time goes to
launches and not to bytes; for them the ratio to generate() says more.

Sides take turns, the first round is thrown away, and the figures are medians over the rest with their spread. On one
CPU thread the clock is the process's own time, which leaves out other programs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.measure import (
    Side,
    clock_for,
    command,
    device_name,
    launches_per_layer,
    ratio,
    rounds,
    speed,
    versions,
)
from benchmarks.models import DECODE, SHAPES, as_loaded, build, by_bitsandbytes, bytes_per_token, prompt
from qwenvl.cli.doctor import copy_bandwidth
from qwenvl.decoding import step_attention
from qwenvl.decoding.decoder import Decoder
from qwenvl.request import Sampling

SAMPLED = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
# 16-pixel patches along a side of a square picture, and text tokens: about 1,100 tokens in all for the large models.
PROMPTS = {"nano": (16, 32), "small": (16, 32), "0.6b": (64, 64), "2b": (64, 64), "4b": (64, 64), "8b": (64, 64)}


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = options.device, getattr(torch, options.dtype)
    model = build(SHAPES[options.shape], device, dtype)
    inputs = prompt(model, *(PROMPTS[options.shape] if options.image_side is None else (options.image_side, 64)))
    plain = model
    model = as_loaded(plain, options.quantization)
    usual = model if device != "cpu" else by_bitsandbytes(plain, options.quantization)
    decoder = _decoder(model, options)
    sides = {"ours": ours(decoder, inputs, options.sampled), "generate": theirs(usual, inputs, options.sampled)}
    if options.static:
        sides["generate, static cache"] = theirs(usual, inputs, options.sampled, cache_implementation="static")
    if options.quantization != "none":
        sides["unquantized"] = ours(_decoder(as_loaded(plain, "none"), options), inputs, options.sampled)

    started = time.perf_counter()
    first = sides["ours"](options.tokens).rows[0]
    first_run_s = time.perf_counter() - started
    agree = None if options.sampled else in_common(first, sides["generate"](options.tokens))
    found = rounds(sides, options.tokens, options.rounds, clock_for(device))
    last = sides["ours"](options.tokens)
    print(
        json.dumps(
            {
                **_described(options, inputs),
                # First, because measuring the bandwidth takes gigabytes itself.
                **(of_the_gpu(decoder, model) if device == "cuda" else {}),
                **speeds(found, copy_bandwidth(device, clock=clock_for(device)) / _bytes(model, inputs, options)),
                "tier": last.tier,
                "step_attention": decoder.attention,
                "same_tokens_as_generate": agree,
                "launches_per_layer": launches_per_layer(decoder, inputs),
                "first_run_s": round(first_run_s, 2),
            }
        )
    )


def _decoder(model: Any, options: argparse.Namespace) -> Decoder:
    if options.step_attention == "flash":
        step_attention.FLASH_FROM = 1
    decoder = Decoder(model, "sdpa", options.tier, decode=DECODE)
    if options.step_attention == "sdpa" and decoder.tier == "own step":
        decoder._lanes._step.attention.all_as_short()  # type: ignore[union-attr]
    return decoder


def _described(options: argparse.Namespace, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured, where, when, and by which command."""
    return {
        "command": command("benchmarks.decode"),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(options.device),
        "versions": versions(),
        "shape": options.shape,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "threads": torch.get_num_threads() if options.device == "cpu" else None,
        "sampled": options.sampled,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": options.tokens,
        "rounds": options.rounds,
    }


def speeds(found: dict[str, list[dict]], ceiling: float) -> dict[str, Any]:
    """Summarise rounds with the sides "ours", "generate" and perhaps others; ceiling in tokens per second."""
    by_side = {name: [figures["tokens_per_s"] for figures in rounds] for name, rounds in found.items()}
    prefills = {name: statistics.median(figures["prefill_s"] for figures in rounds) for name, rounds in found.items()}
    mine, others = statistics.median(by_side["ours"]), by_side["generate"]
    more = [name for name in by_side if name not in ("ours", "generate")]
    return {
        **speed(found["ours"]),
        "generate_tokens_per_s": round(statistics.median(others), 1),
        "generate_tokens_per_s_range": [round(min(others), 1), round(max(others), 1)],
        "ratio": ratio(by_side["ours"], others),
        "ratios": {name: ratio(by_side["ours"], by_side[name]) for name in more},
        "ceiling_tokens_per_s": round(ceiling, 1),
        "ceiling_share": round(mine / ceiling, 3),
        "prefill_s": round(prefills["ours"], 4),
        "generate_prefill_s": round(prefills["generate"], 4),
    }


def of_the_gpu(decoder: Decoder, model: Any) -> dict[str, Any]:
    """Return the time of the captures, the bytes of the weights, and the peak of allocated memory."""
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {
        "captured": len(decoder._steps),
        "capture_s": [round(step.seconds, 3) for step in decoder._steps.values()],
        "weights_bytes": weights,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "allocator": torch.cuda.get_allocator_backend(),
    }


def _bytes(model: Any, inputs: dict[str, Any], options: argparse.Namespace) -> int:
    return bytes_per_token(model, inputs["input_ids"].shape[1] + options.tokens // 2)


def in_common(one: tuple[int, ...], other: list[int]) -> int:
    """Count how many tokens are the same from the start on."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


def ours(decoder: Decoder, inputs: dict[str, Any], sampled: bool = False) -> Side:
    """Return a side of rounds() that gives an answer by our decoder."""
    calls = 0

    def run(tokens: int) -> Any:
        nonlocal calls
        calls += 1
        how = {**SAMPLED, "do_sample": True, "seed": 1} if sampled else {"do_sample": False}
        # A new name for the picture each time, so that the prompt is computed anew, as in generate().
        sampling = Sampling(max_new_tokens=tokens, **how)
        return decoder.generate(inputs, sampling, 1 if sampled else None, lambda rows: None, lambda: None, str(calls))

    return run


def theirs(model: Any, inputs: dict[str, Any], sampled: bool = False, **more: Any) -> Side:
    """Return a side of rounds() that gives an answer by generate()."""
    how = {**SAMPLED, "do_sample": True} if sampled else {"do_sample": False}

    def run(tokens: int) -> list[int]:
        output = model.generate(**inputs, max_new_tokens=tokens, **how, **more)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    return run


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="nano")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--quantization", choices=("none", "4bit", "8bit"), default="none", help="also against the unquantized model")
    add("--tier", choices=("own step", "generic step", "generate"), help="default: the best that fits")
    add("--step-attention", choices=("auto", "sdpa", "flash"), default="auto", help="of the own step on a GPU")
    add("--sampled", action="store_true", help="temperature 0.7, top_k 20, top_p 0.8, repetition penalty 1.05")
    add("--static", action="store_true", help="also against generate() with its static cache (compiled on a GPU)")
    add("--tokens", type=int, default=256)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=1, help="CPU threads; 0 leaves it to torch")
    add("--image-side", type=int, help="patches of 16 pixels a side; four are a token")
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


if __name__ == "__main__":
    main()
