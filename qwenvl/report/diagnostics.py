"""The figures of a run: phase times, tokens, attention, memory, GPU; and why it was slow. Not on the hot path."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..decoding.rows import Generation
from ..log import gigabytes, log
from ..process import PROCESS
from ..request import LoadSpec, Stats
from ..settings import DIAGNOSTICS
from . import nvml, sdpa
from .slowness import why_slow
from .stalls import StackSampler, pace, telling_s

FULL, OFF = DIAGNOSTICS[1:]
# Warn if torch reserves more GPU memory than this without using it.
UNUSED_BYTES = 1 << 30
# The most stalls in the log; the stats hold all.
STALLS_TOLD = 5


class Phases:
    """Sums of the seconds that the named parts of a run took: with phases("media"): ..."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Diagnosis:
    """Collects and logs the figures of one run, as many as the level asks for.

    Args:
        level: summary, full or off.

    Attributes:
        began: when the run began, by time.perf_counter().
    """

    def __init__(self, level: str) -> None:
        self._level = level
        self.began = time.perf_counter()
        self.phases = Phases()
        self._kernels: dict[str, str] = {}
        self._sampler: StackSampler | None = None
        self._before: dict[str, Any] = {}
        self._after: dict[str, Any] = {}

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Context manager that watches the model while it generates."""
        if self._level != FULL:
            yield
            return
        self._before = _look_at(model.device, before=True)
        with ExitStack() as stack:
            self._kernels = stack.enter_context(sdpa.observed(model))
            stack.enter_context(_vision_time(model, self.phases))
            self._sampler = stack.enter_context(StackSampler())
            yield
            self._after = _look_at(model.device)

    def finish(self, stats: Stats, generations: Sequence[Generation], spec: LoadSpec) -> Stats:
        """Log what the level asks for; return the stats, at level full with the figures of all generations."""
        if self._level == OFF:
            return stats
        if self._level == FULL:
            stats = replace(stats, diagnostics=self._figures(stats, generations))
        log.info("%s", stats)
        for line in in_words(stats.diagnostics or {}):
            log.info("%s", line)
        _warn_of_unused(self._after)
        device = torch.device(stats.loaded.device)
        if reason := why_slow(spec, stats, generations, lambda: self._after or _look_at(device)):
            log.warning("%s", reason)
        return stats

    def _figures(self, stats: Stats, generations: Sequence[Generation]) -> dict[str, Any]:
        unknown = {self._after["not_read"], *_not_observed(stats, self._kernels)} - {""}
        for reason in sorted(unknown):
            if PROCESS.is_new("diagnostics", reason):
                log.info("diagnostics: %s", reason)
        return {
            "phases_s": _phases(self.phases.seconds, stats, generations),
            "tokens": pace([generation.times for generation in generations], self._sampler),
            "attention": {"asked_for": stats.loaded.attention, "allowed": sdpa.allowed(), "ran": dict(self._kernels)},
            "memory": {"before": self._before["memory"], "after": self._after["memory"]},
            "gpu": {"before": self._before["gpu"], "after": self._after["gpu"]},
            "not_known": sorted(unknown),
        }


def _phases(measured: Mapping[str, float], stats: Stats, generations: Sequence[Generation]) -> dict[str, float]:
    """Return seconds by phase, in order. Showing a token's text counts as detokenise, not as decode."""
    tower = measured.get("vision_tower", 0.0)
    showing = sum(telling_s(generation.times) for generation in generations)
    last = sum(generation.times[-1].returned - generation.times[-1].arrived for generation in generations)
    decode = sum(generation.decode_s for generation in generations)
    return {
        "media": measured.get("media", 0.0),
        "load": stats.loaded.load_s,
        **{name: measured.get(name, 0.0) for name in ("template", "processor", "transfer")},
        "vision_tower": tower,
        "prefill": sum(generation.prefill_s for generation in generations) - tower,
        "decode": max(0.0, decode - (showing - last)),
        "detokenise": showing,
    }


def _not_observed(stats: Stats, kernels: Mapping[str, str]) -> Iterator[str]:
    if stats.loaded.attention == "sdpa":
        yield "which attention kernel the token loop runs is not known: watching it would slow every token"
        if "prefill" not in kernels:
            yield "which attention kernel the prefill runs was not seen"


def _look_at(device: torch.device, before: bool = False) -> dict[str, Any]:
    """Read memory and GPU state now; with `before`, reset the peak of memory first."""
    if device.type != "cuda":
        reason = f"GPU memory, clocks, power and temperature are not read on {device.type}"
        return {"memory": None, "gpu": None, "not_read": reason}
    if before:
        torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    memory = {
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "reserved_bytes": torch.cuda.memory_reserved(device),
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "free_bytes": free,
        "total_bytes": total,
    }
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if torch.version.hip or uuid is None:
        return {"memory": memory, "gpu": None, "not_read": "clocks, power and temperature are read of NVIDIA GPUs only"}
    gpu, reason = nvml.state(str(uuid))
    return {"memory": memory, "gpu": gpu or None, "not_read": reason and f"clocks, power, temperature: {reason}"}


@contextmanager
def _vision_time(model: Any, phases: Phases) -> Iterator[None]:
    tower = next((module for name, module in model.named_modules() if name.split(".")[-1] == "visual"), None)
    if tower is None:
        yield
        return
    clock = _Clock(model.device, phases)
    hooks = [tower.register_forward_pre_hook(clock.start), tower.register_forward_hook(clock.stop)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Clock:
    """A clock for the vision tower that waits for the device at its start and end."""

    def __init__(self, device: torch.device, phases: Phases) -> None:
        self._device, self._phases = device, phases
        self._running = ExitStack()

    def start(self, *_: Any) -> None:
        self._wait()
        self._running.enter_context(self._phases("vision_tower"))

    def stop(self, *_: Any) -> None:
        self._wait()
        self._running.close()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def in_words(figures: Mapping[str, Any]) -> Iterator[str]:
    """Format the figures of a full diagnosis as lines for the log."""
    if not figures:
        return
    seconds = figures["phases_s"].items()
    yield "phases: " + ", ".join(f"{name.replace('_', ' ')} {1000 * value:.0f} ms" for name, value in seconds)
    yield from _token_lines(figures["tokens"])
    attention = figures["attention"]
    ran = ", ".join(f"{kernel} in the {part.replace('_', ' ')}" for part, kernel in attention["ran"].items())
    yield f"attention: {attention['asked_for']}; allowed {', '.join(attention['allowed'])}; ran {ran or 'unseen'}"
    for name, line in {"memory": _memory, "gpu": _gpu}.items():
        before, after = figures[name]["before"], figures[name]["after"]
        if after:
            yield f"{name} before: {line(before)}; after: {line(after)}"


def _token_lines(tokens: Mapping[str, Any]) -> Iterator[str]:
    if not tokens:
        return
    stalls = sorted(tokens["stalls"], key=lambda stall: -stall["ms"])
    yield (
        f"tokens: shortest {tokens['shortest_ms']:.1f} ms, median {tokens['median_ms']:.1f} ms, "
        f"longest {tokens['longest_ms']:.1f} ms, {len(stalls)} over twice the median"
    )
    for stall in stalls[:STALLS_TOLD]:
        meanwhile = ", ".join(stall["meanwhile"]) or "too short to see what went on"
        where = f"token {stall['after_token']}"
        if stall["generation"] > 1:
            where += f" of generation {stall['generation']}"
        took = f"{stall['ms']:.1f} ms after {where}, of which {stall['telling_ms']:.1f} ms to show it"
        yield f"stall of {took}: {meanwhile}"


def _warn_of_unused(looked: Mapping[str, Any]) -> None:
    memory = looked.get("memory")
    unused = memory["reserved_bytes"] - memory["allocated_bytes"] if memory else 0
    if unused > UNUSED_BYTES:
        kept = gigabytes(unused)
        log.warning("torch keeps %s of the GPU's memory that nothing uses, so other programs cannot have it", kept)


def _memory(memory: Mapping[str, int]) -> str:
    names = {"allocated_bytes": "allocated", "reserved_bytes": "reserved", "peak_bytes": "at most"}
    return ", ".join(f"{gigabytes(memory[name], 2)} {word}" for name, word in names.items())


def _gpu(gpu: Mapping[str, Any]) -> str:
    held = gpu["held_back_by"]
    return (
        f"{_value(gpu['clock_mhz'])} of {_value(gpu['max_clock_mhz'])} MHz, "
        f"{_value(gpu['power_w'])} of {_value(gpu['power_limit_w'])} W, {_value(gpu['temperature_c'])} C, "
        f"held back by {'unknown' if held is None else ' and '.join(held) or 'nothing'}"
    )


def _value(figure: float | None) -> str:
    return "?" if figure is None else f"{figure:.0f}"
