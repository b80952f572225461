"""Whether a run was much slower than the same model before, and the likeliest reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..decoding.rows import Generation
from ..process import PROCESS, Pace
from ..request import LoadSpec, Stats
from .stalls import pace, telling_s

# Slow is under one part in so many of what was reached before.
SLOW = 3
# Fewer tokens than this say little; the first interval is left out, since a step is captured in it.
LEAST_TOKENS = 16


def why_slow(
    spec: LoadSpec,
    stats: Stats,
    generations: Sequence[Generation],
    looked: Callable[[], Mapping[str, Any]],
    busy: Callable[[], float] | None = None,
) -> str | None:
    """A sentence if this run was slow; remembers the fastest.

    Args:
        generations: of the run; the longest counts.
        looked: memory and GPU, as diagnostics reads them; asked for a slow run only.
        busy: how much of the CPU others use now, 0 to 100; asked for a slow run only.
    """
    made = max(generations, key=lambda each: len(each.times))
    counted = made.times[1:]
    if len(counted) < LEAST_TOKENS:
        return None
    run = Pace((len(counted) - 1) / (counted[-1].arrived - counted[0].arrived), stats.prompt.prompt_tokens)
    key = (spec, stats.decode.tier, len(made.rows))
    best = PROCESS.fastest.setdefault(key, run)
    if run.tokens_per_s > best.tokens_per_s:
        PROCESS.fastest[key] = run
    if run.tokens_per_s * SLOW >= best.tokens_per_s:
        return None
    reason = _of_tokens(made) or _of_gpu(looked()) or _of_others(run, best, (busy or _cpu_percent)())
    return f"{spec.model} made {run.tokens_per_s:.1f} tokens/s, and {best.tokens_per_s:.1f} before: {reason}"


def _of_tokens(made: Generation) -> str | None:
    """Reasons that the times of the tokens prove."""
    whole_s = made.times[-1].told - made.times[0].arrived
    if telling_s(made.times) > whole_s / 2:
        return f"showing the text took {telling_s(made.times):.1f} of {whole_s:.1f} s, so the program around it is busy"
    tokens = pace([made.times])
    longest = max(tokens["stalls"], key=lambda each: each["ms"], default=None)
    lost_s = sum(each["ms"] - tokens["median_ms"] for each in tokens["stalls"]) / 1000
    if longest and lost_s > whole_s / 2:
        return (
            f"{len(tokens['stalls'])} stalls took {lost_s:.1f} of {whole_s:.1f} s, the longest of "
            f"{longest['ms'] / 1000:.1f} s after token {longest['after_token']}; "
            "diagnostics full tells what went on meanwhile"
        )
    return None


def _of_gpu(looked: Mapping[str, Any]) -> str | None:
    """Reasons that the GPU tells."""
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
    """Of all cores, while this process waits here for a tenth of a second."""
    import psutil

    return psutil.cpu_percent(0.1)
