"""Tools of the benchmarks: clocks, rounds in which sides take turns, summaries, counts of launches."""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.launches import Launches
from qwenvl.decoding.decoder import Decoder

Side = Callable[[int], Any]


def synced_clock(device: str) -> Callable[[], float]:
    """Return a clock of wall time that waits for the GPU first, if the device is one."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def clock_for(device: str) -> Callable[[], float]:
    """Return the clock to use: on one CPU thread the process's own time, which leaves out other programs."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else synced_clock(device)


def rounds(sides: dict[str, Side], tokens: int, count: int, clock: Callable[[], float]) -> dict[str, list[dict]]:
    """Measure, per side and round, the loop's speed (a long answer less a short one) and the short one's time."""
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for counted in [False] + [True] * count:
        for name, side in sides.items():
            times = [clock()]
            for length in (1, tokens):
                side(length)
                times.append(clock())
            first, all_ = times[1] - times[0], times[2] - times[1]
            if counted:
                found[name].append({"tokens_per_s": (tokens - 1) / (all_ - first), "prefill_s": first})
    return found


def speed(found: list[dict]) -> dict[str, Any]:
    """Return median and range of the speed of one side of rounds()."""
    values = [figures["tokens_per_s"] for figures in found]
    return {
        "tokens_per_s": round(statistics.median(values), 1),
        "tokens_per_s_range": [round(min(values), 1), round(max(values), 1)],
    }


def spread(values: list[float], digits: int = 4) -> dict[str, Any]:
    """Return the median and the range."""
    return {
        "median": round(statistics.median(values), digits),
        "range": [round(min(values), digits), round(max(values), digits)],
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median over the rounds of one side's figure divided by the other's in the same round."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)


def launches_per_layer(decoder: Decoder, inputs: dict[str, Any]) -> float | None:
    """Count a captured step's launches per layer: what one more layer adds to our own step; the generic step's mean."""
    lanes: Any = decoder._lanes
    if lanes is None:
        return None
    with torch.inference_mode():
        _, logits = lanes.prefill(inputs, 8, lambda: None, "")
        tokens = logits.argmax(-1)
        if decoder.tier == "generic step":
            return round(_launches(lanes, tokens) / len(lanes._cache.layers), 1)
        step, layers = lanes._step, lanes._step._layers
        kept, step._fused_norm = step._fused_norm, True
        step._layers = layers[:1]
        one = _launches(lanes, tokens)
        step._layers = layers
        more = _launches(lanes, tokens) - one
        step._fused_norm = kept
    return round(more / (len(layers) - 1), 1)


def _launches(lanes: Any, tokens: torch.Tensor) -> int:
    with Launches() as launches:
        lanes.step(tokens, lanes.span())
    return len(launches.names)


def device_name(device: str) -> str:
    """Return the name of the GPU or processor, and not that of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else f"{platform.machine()} CPU"


def command(module: str) -> str:
    """Return the command that started this run."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def versions() -> dict[str, str]:
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
