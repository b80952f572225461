"""The lines of a run, the most important first. A new one is a function and a Line in the list."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.decode import in_common, of_the_gpu, ours, speeds, theirs
from benchmarks.gpu.alternations import alternations
from benchmarks.gpu.bench import ASYNC, Bench, Line, NotMeasured, Options
from benchmarks.gpu.others import comfyui_alternations, comfyui_decode, four_bit, gpu_tests, hybrid
from benchmarks.kernels import by_kernel
from benchmarks.measure import Side, device_name, ratio, rounds, speed, spread, versions
from benchmarks.models import DECODE, bytes_per_token, prefill_flops, prompt, text_prompt
from benchmarks.prefill import first_token
from qwenvl.decoding import step_attention
from qwenvl.decoding.decoder import Decoder
from qwenvl.report.facts import probe

KERNELS = 20


def lines(options: Options) -> list[Line]:
    """List all lines; those with ComfyUI only if there is a checkout of it."""
    found = [
        Line("machine", machine, 60),
        Line("own-step", own_step, 120),
        Line("kernels", kernels, 60),
        Line("generate", generate, 120),
        Line("prefill", prefill, 60),
        Line("flash-from-1", flash_from_one, 90),
        Line("4bit", four_bit, 120),
        Line("hybrid", hybrid, 150, "hybrid"),
        Line("other-allocator", other_allocator, 90, "other allocator", ASYNC),
        Line("alternations", alternations, 200, "alternations"),
        Line("tests", gpu_tests, 180, "tests"),
    ]
    if options.comfyui:
        found.append(Line("comfyui-decode", comfyui_decode, 180, "comfyui", ASYNC))
        found.append(Line("comfyui-alternations", comfyui_alternations, 180, "comfyui", ASYNC))
    return found


def machine(bench: Bench) -> dict[str, Any]:
    """Describe the machine, and measure its limits."""
    facts = probe()
    cuda = bench.device == "cuda"
    return {
        "device": device_name(bench.device),
        "driver": facts.driver,
        "cuda": facts.cuda,
        "system": facts.system,
        "versions": versions(),
        "packages": dict(facts.packages),
        "memory_bytes": torch.cuda.mem_get_info()[1] if cuda else None,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "ceiling": bench.ceiling.figures(),
    }


def own_step(bench: Bench) -> dict[str, Any]:
    """Measure our step by itself: tokens per second, and their share of the memory's ceiling."""
    side = ours(bench.decoder, bench.inputs)
    started = time.perf_counter()
    answer = side(bench.tokens)
    first_run_s = time.perf_counter() - started
    found = speed(rounds({"ours": side}, bench.tokens, bench.rounds, bench.clock)["ours"])
    return {
        "tier": answer.tier,
        "tier_reason": answer.tier_reason,
        "step_attention": bench.decoder.attention,
        "prompt_tokens": bench.inputs["input_ids"].shape[1],
        "new_tokens": bench.tokens,
        **found,
        **bench.share(found["tokens_per_s"], _bytes(bench)),
        "first_run_s": round(first_run_s, 2),
        **(of_the_gpu(bench.decoder, bench.model) if bench.device == "cuda" else {}),
    }


def other_allocator(bench: Bench) -> dict[str, Any]:
    """Measure own_step with the allocator that ComfyUI sets, in another process, so without a ratio per round."""
    if bench.device != "cuda":
        raise NotMeasured("torch has one allocator on a CPU.")
    return own_step(bench)


def kernels(bench: Bench) -> dict[str, Any]:
    """Measure where the time of a step goes."""
    return by_kernel(bench.decoder, bench.inputs, min(bench.tokens, 64), bench.device, KERNELS)


def generate(bench: Bench) -> dict[str, Any]:
    """Measure generate() and ours in turns."""
    sides = {"ours": ours(bench.decoder, bench.inputs), "generate": theirs(bench.model, bench.inputs)}
    tokens = bench.tokens // 2
    same = in_common(sides["ours"](tokens).rows[0], sides["generate"](tokens))
    found = rounds(sides, tokens, bench.rounds, bench.clock)
    most = bench.ceiling.bytes_per_s / _bytes(bench)
    return {**speeds(found, most), "new_tokens": tokens, "same_tokens_as_generate": same}


def prefill(bench: Bench) -> dict[str, Any]:
    """Measure the time to the first token, against generate() and against as many tokens of text alone."""
    convolution, inputs = bench.convolution, bench.inputs
    found = first_token(bench.decoder, bench.model, convolution, inputs, bench.clock, bench.rounds)
    tokens = inputs["input_ids"].shape[1]
    seconds = found["prefill_s"]["ours"]
    most = bench.ceiling.matrix_product_flops_per_s
    return {
        "prompt_tokens": tokens,
        "picture_pixels": len(inputs["pixel_values"]) * 16**2,
        "first_token_s": seconds,
        "text_only_first_token_s": spread(_first_tokens(bench, text_prompt(bench.model, tokens))),
        "ceiling_s": round(prefill_flops(bench.model, inputs) / most, 5),
        "ceiling_share": round(prefill_flops(bench.model, inputs) / most / seconds, 3),
        **found,
    }


def _first_tokens(bench: Bench, inputs: dict[str, torch.Tensor]) -> list[float]:
    side, seconds = ours(bench.decoder, inputs), []
    for _ in range(bench.rounds + 1):
        start = bench.clock()
        side(1)
        seconds.append(bench.clock() - start)
    return seconds[1:]


def flash_from_one(bench: Bench) -> dict[str, Any]:
    """Measure flash decoding for short texts too, in turns with the default, at two lengths."""
    default = Decoder(bench.model, "sdpa", decode=DECODE)
    if not default._lanes._step.attention.reads_only_text:  # type: ignore[union-attr]
        raise NotMeasured("Flash decoding cannot be had here, so there is nothing to compare.")
    with_flash = Decoder(bench.model, "sdpa", decode=DECODE)
    found = {}
    for inputs in (prompt(bench.model, 16, 64), bench.inputs):
        sides = {"default": ours(default, inputs), "flash": _flash_from(1, ours(with_flash, inputs))}
        by_side = rounds(sides, bench.tokens, bench.rounds, bench.clock)
        rates = {name: [turn["tokens_per_s"] for turn in by_side[name]] for name in by_side}
        figures = {name: speed(by_side[name]) for name in by_side}
        found[f"{inputs['input_ids'].shape[1]} tokens"] = {**figures, "ratio": ratio(rates["flash"], rates["default"])}
    return {"default_from": step_attention.FLASH_FROM, "with_flash": with_flash.attention, "by_prompt": found}


def _flash_from(slots: int, side: Side) -> Side:
    """Return the side with flash decoding from `slots` slots on while it runs."""

    def run(tokens: int) -> Any:
        kept = step_attention.FLASH_FROM
        step_attention.FLASH_FROM = slots
        try:
            return side(tokens)
        finally:
            step_attention.FLASH_FROM = kept

    return run


def _bytes(bench: Bench) -> int:
    """Return the bytes that a step in the middle of an answer reads."""
    return bytes_per_token(bench.model, bench.inputs["input_ids"].shape[1] + bench.tokens // 2)
