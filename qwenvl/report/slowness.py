"""Detection of runs that are much slower than earlier ones of the same model, with the likeliest reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..decoding.rows import Generation
from ..process import PROCESS, Pace
from ..request import LoadSpec, Stats
from .stalls import pace, telling_s

# A run is slow if its speed times this is below the best speed so far.
SLOW = 3
# Fewer tokens than this are not judged. The first interval is left out, since a step is captured in it.
LEAST_TOKENS = 16


def why_slow(
    spec: LoadSpec,
    stats: Stats,
    generations: Sequence[Generation],
    looked: Callable[[], Mapping[str, Any]],
    busy: Callable[[], float] | None = None,
) -> str | None:
    """Explain in a sentence why this run was slow; None if it was not. Remembers the fastest run.

    Args:
        generations: those of the run; the longest is judged.
        looked: returns memory and GPU as diagnostics reads them; called for a slow run only.
        busy: returns the share of the CPU in use, 0 to 100; called for a slow run only.
    """
    longest = max(generations, key=lambda generation: len(generation.times))
    counted = longest.times[1:]
    if len(counted) < LEAST_TOKENS:
        return None
    run = Pace((len(counted) - 1) / (counted[-1].arrived - counted[0].arrived), stats.prompt.prompt_tokens)
    key = (spec, stats.decode.tier, len(longest.rows))
    best = PROCESS.fastest.setdefault(key, run)
    if run.tokens_per_s > best.tokens_per_s:
        PROCESS.fastest[key] = run
    if run.tokens_per_s * SLOW >= best.tokens_per_s:
        return None
    reason = _of_tokens(longest) or _of_gpu(looked()) or _of_others(run, best, (busy or _cpu_percent)())
    return f"{spec.model} made {run.tokens_per_s:.1f} tokens/s, and {best.tokens_per_s:.1f} before: {reason}"


def _of_tokens(generation: Generation) -> str | None:
    """Find a reason in the times of the tokens: slow display, or stalls; None if they show neither."""
    whole_s = generation.times[-1].returned - generation.times[0].arrived
    showing_s = telling_s(generation.times)
    if showing_s > whole_s / 2:
        return f"showing the text took {showing_s:.1f} of {whole_s:.1f} s, so the program around it is busy"
    tokens = pace([generation.times])
    longest = max(tokens["stalls"], key=lambda stall: stall["ms"], default=None)
    lost_s = sum(stall["ms"] - tokens["median_ms"] for stall in tokens["stalls"]) / 1000
    if longest and lost_s > whole_s / 2:
        return (
            f"{len(tokens['stalls'])} stalls took {lost_s:.1f} of {whole_s:.1f} s, the longest of "
            f"{longest['ms'] / 1000:.1f} s after token {longest['after_token']}; "
            "diagnostics full shows what went on meanwhile"
        )
    return None


def _of_gpu(looked: Mapping[str, Any]) -> str | None:
    """Find a reason in the GPU's clock or free memory; None if both are fine or unknown."""
    gpu, memory = looked["gpu"] or {}, looked["memory"] or {}
    clock, most = gpu.get("clock_mhz"), gpu.get("max_clock_mhz")
    if clock and most and clock < most / 2:
        held = f", held back by {' and '.join(gpu['held_back_by'])}" if gpu["held_back_by"] else ""
        return f"the GPU runs at {clock} of {most} MHz{held}"
    if memory and memory["free_bytes"] < memory["total_bytes"] / 50:
        free, total = memory["free_bytes"] / 1e9, memory["total_bytes"] / 1e9
        return f"{free:.1f} of {total:.0f} GB are free on the GPU, so its driver may use slow RAM instead"
    return None


def _of_others(run: Pace, best: Pace, busy: float) -> str:
    if busy > 50:
        return f"other programs use {busy:.0f} % of the CPU"
    if run.prompt_tokens > 4 * best.prompt_tokens:
        return f"the prompt has {run.prompt_tokens} tokens, and had {best.prompt_tokens} then"
    return "no figure says why; diagnostics full shows them all"


def _cpu_percent() -> float:
    """Measure the load of all cores, 0 to 100, while this process waits for a tenth of a second."""
    import psutil

    return psutil.cpu_percent(0.1)
