"""Lines for quantized weights, other models, and other programs."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from typing import Any

from benchmarks.decode import in_common, of_the_gpu, ours, speeds, theirs
from benchmarks.gpu.bench import ROOT, Bench, NotMeasured
from benchmarks.hybrid import build_hybrid, hybrid_bytes_per_token, why_not_hybrid
from benchmarks.measure import ratio, rounds, speed
from benchmarks.models import DECODE, by_bitsandbytes, bytes_per_token, prompt
from qwenvl.decoding.decoder import Decoder

# The files with tests that need a GPU, for a checkout that does not mark these tests.
TESTS = ("tests/decoding/test_cuda_graph.py", "tests/decoding/test_step_attention.py")
MARKED = ("-m", "gpu", "tests/decoding")
SHOWN = 3000


def four_bit(bench: Bench) -> dict[str, Any]:
    """Measure bitsandbytes' 4-bit weights, in turns with the plain ones."""
    if find_spec("bitsandbytes") is None:
        raise NotMeasured("bitsandbytes is not installed here.")
    model = by_bitsandbytes(bench.model, "4bit")
    decoder = Decoder(model, "sdpa", decode=DECODE)
    sides = {"4bit": ours(decoder, bench.inputs), "plain": ours(bench.decoder, bench.inputs)}
    by_side = rounds(sides, bench.tokens, bench.rounds, bench.clock)
    rates = {name: [turn["tokens_per_s"] for turn in found] for name, found in by_side.items()}
    found = speed(by_side["4bit"])
    context = bench.inputs["input_ids"].shape[1] + bench.tokens // 2
    # No peak, because both models are in memory.
    captured = {**of_the_gpu(decoder, model), "peak_bytes": None} if bench.device == "cuda" else {}
    return {
        "tier": decoder.tier,
        **found,
        # Bytes of the packed weights only: the scales add about 3 %.
        **bench.share(found["tokens_per_s"], bytes_per_token(model, context)),
        "plain": speed(by_side["plain"]),
        "ratio_to_plain": ratio(rates["4bit"], rates["plain"]),
        **captured,
    }


def hybrid(bench: Bench) -> dict[str, Any]:
    """Measure linear attention in three layers of four, on transformers' static cache, in turns with generate()."""
    if reason := why_not_hybrid():
        raise NotMeasured(f"{reason}.")
    most = bench.ceiling.bytes_per_s
    model = build_hybrid(bench.options.shape, bench.device, bench.dtype)
    # The best tier on a GPU; on a CPU the best would be generate() itself.
    decoder = Decoder(model, "sdpa", None if bench.device == "cuda" else "generic step")
    inputs = prompt(model, *((32, 64) if bench.options.shape == "4b" else (8, 16)))
    sides = {"ours": ours(decoder, inputs), "generate": theirs(model, inputs)}
    tokens = bench.tokens // 4
    same = in_common(sides["ours"](tokens).rows[0], sides["generate"](tokens))
    size = hybrid_bytes_per_token(model, inputs["input_ids"].shape[1] + tokens // 2)
    return {
        "tier": decoder.tier,
        "tier_reason": decoder.tier_reason,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": tokens,
        **speeds(rounds(sides, tokens, bench.rounds, bench.clock), most / size),
        "same_tokens_as_generate": same,
        **(of_the_gpu(decoder, model) if bench.device == "cuda" else {}),
    }


def gpu_tests(bench: Bench) -> dict[str, Any]:
    """Run the tests that need a GPU. If any fails, the line fails with their output."""
    marked = '"gpu:' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    which = MARKED if marked else TESTS
    done = bench.program(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *which)
    printed = done.stdout.strip()
    summary = printed.splitlines()[-1] if printed else "pytest printed nothing"
    if done.returncode:
        raise RuntimeError(f"{printed[-SHOWN:]}\n{done.stderr[-SHOWN:]}\npytest {' '.join(which)}: {summary}")
    return {"tests": " ".join(which), "summary": summary}


def comfyui_decode(bench: Bench) -> dict[str, Any]:
    """Measure ComfyUI's own model against ours."""
    dtype = str(bench.dtype).removeprefix("torch.")
    where = ("--shape", bench.options.shape, "--device", bench.device, "--dtype", dtype)
    return _last_line(bench, "benchmarks.comfyui", *where, "--rounds", str(bench.rounds), "--tokens", str(bench.tokens))


def comfyui_alternations(bench: Bench) -> dict[str, Any]:
    """Measure alternations with ComfyUI's memory manager."""
    more = () if bench.device == "cuda" else ("--cpu", "--block-gb", "0.1")
    return _last_line(bench, "benchmarks.alternate", "--turns", "20", *more)


def _last_line(bench: Bench, module: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark that needs ComfyUI's checkout; return its last line of JSON."""
    done = bench.program(sys.executable, "-m", module, bench.options.comfyui, *arguments)
    if done.returncode:
        raise RuntimeError(f"{done.stderr[-SHOWN:]}\n{module} ended with status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])
