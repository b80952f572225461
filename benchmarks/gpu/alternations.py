"""A model and a block of other memory take turns on one GPU, as beside a diffusion model in ComfyUI.

In every turn the model waits in RAM while the block fills the GPU, comes back when the block is gone, and answers.
benchmarks.alternate does the same with ComfyUI's own memory manager.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.ceilings import best_seconds
from benchmarks.gpu.bench import Bench, NotMeasured
from benchmarks.measure import spread
from benchmarks.models import DECODE
from qwenvl.comfyui import host
from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.rows import Generation
from qwenvl.loading.capabilities import Machine
from qwenvl.loading.loader import LoadPlan, ModelHandle, park
from qwenvl.request import LoadSpec, Sampling

TURNS = 20
# Bytes that the block leaves free, since a driver and its libraries need some.
LEFT_BYTES = 1 << 30
TOKENS = 128
# Turns after which buffers and captures have their final size.
EARLY = 4


class Memory(Protocol):
    """Memory on the device that is not the model's."""

    def take(self) -> None:
        """Fill the free memory."""

    def free(self) -> None:
        """Give all of it back."""

    def used(self) -> int:
        """Return the bytes in use on the device, by all programs."""


class Block:
    """Most of what is free on the current GPU, in one tensor."""

    def __init__(self) -> None:
        self._held: torch.Tensor | None = None
        self.size = 0

    def take(self) -> None:
        _give_back()
        self.size = max(0, torch.cuda.mem_get_info()[0] - LEFT_BYTES)
        self._held = torch.empty(self.size, dtype=torch.uint8, device="cuda")

    def free(self) -> None:
        self._held = None
        _give_back()

    def used(self) -> int:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return total - free


def _give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds of a turn's parts; its answer's tokens per second with (and "steady": without) the work after a move."""

    free_s: float
    bring_s: float
    answer_s: float
    park_s: float
    take_s: float
    first_token_s: float
    tokens_per_s: float
    steady_tokens_per_s: float
    ids: tuple[int, ...]
    used_bytes: int

    @property
    def seconds(self) -> float:
        """Return the seconds of the alternation, without the answer."""
        return self.free_s + self.bring_s + self.park_s + self.take_s


def alternations(bench: Bench) -> dict[str, Any]:
    """Measure TURNS alternations, or as many as there is time for."""
    if bench.device == "cpu":
        raise NotMeasured("A model on the CPU is in RAM already: nothing is moved.")
    plan, machine = LoadPlan("none", "sdpa"), Machine(f"cuda:{torch.cuda.current_device()}", bench.dtype, "")
    handle = ModelHandle(LoadSpec("random"), plan, machine, bench.model, None, None, 0.0, "qwen3_vl")
    size = sum(weight.numel() * weight.element_size() for weight in bench.model.parameters())
    most = _copied_per_s()
    block = Block()
    turns = alternate(handle, bench.inputs, block, TURNS, bench.ends)
    brought = size / statistics.median(turn.bring_s for turn in turns)
    return {
        **figures(turns),
        "block_bytes": block.size,
        "weights_bytes": size,
        "brought_bytes_per_s": float(f"{brought:.3g}"),
        # The ceiling is that of pinned memory; the weights wait in ordinary memory.
        "ceiling_bytes_per_s": float(f"{most:.3g}"),
        "ceiling_share": round(brought / most, 3),
    }


def alternate(
    handle: ModelHandle, inputs: dict[str, Any], memory: Memory, count: int, ends: float, tokens: int = TOKENS
) -> list[Turn]:
    """Do up to `count` turns, as many as end in time, but at least one.

    Args:
        ends: when they must have ended, by time.monotonic().
        tokens: tokens of each answer.

    Raises:
        NotMeasured: the RAM has no room for the model.
    """
    if (bring_back := park(handle, host.free_ram())) is None:
        raise NotMeasured("There is too little free RAM for the model to wait in.")
    memory.take()
    turns: list[Turn] = []
    longest = 0.0
    while not turns or (len(turns) < count and time.monotonic() + 2 * longest < ends):
        started = time.monotonic()
        turn, bring_back = _turn(handle, bring_back, inputs, memory, tokens)
        turns.append(turn)
        longest = max(longest, time.monotonic() - started)
    return turns


def _turn(
    handle: ModelHandle, bring_back: Any, inputs: dict[str, Any], memory: Memory, tokens: int
) -> tuple[Turn, Any]:
    times = [time.perf_counter()]
    memory.free()
    times.append(time.perf_counter())
    bring_back()
    memory.used()  # waits for the copies
    times.append(time.perf_counter())
    handle.decoder = Decoder(handle.model, "sdpa", decode=DECODE)
    sampling = Sampling(do_sample=False, max_new_tokens=tokens)
    answer = handle.decoder.generate(inputs, sampling, None, lambda rows: None, lambda: None, "")
    times.append(time.perf_counter())
    parked = park(handle, 1 << 50)
    memory.free()
    used = memory.used()
    times.append(time.perf_counter())
    memory.take()
    memory.used()
    times.append(time.perf_counter())
    parts = (b - a for a, b in itertools.pairwise(times))
    return Turn(*parts, answer.prefill_s, answer.tokens_per_s, _steady(answer), answer.ids, used), parked


def _steady(answer: Generation) -> float:
    """Return tokens per second by the median time between two tokens, in which no capture falls."""
    arrived = [token.arrived for token in answer.times]
    between = [b - a for a, b in itertools.pairwise(arrived)]
    return 1 / statistics.median(between) if between and statistics.median(between) > 0 else 0.0


def figures(turns: list[Turn]) -> dict[str, Any]:
    """Summarise all turns. The first and the last are also given apart, to show if anything gets worse."""
    early, last = turns[min(EARLY, len(turns) - 1)], turns[-1]
    parts = ("free_s", "bring_s", "answer_s", "park_s", "take_s", "first_token_s")
    return {
        "turns": len(turns),
        "seconds_per_alternation": spread([turn.seconds for turn in turns]),
        "parts": {name: spread([getattr(turn, name) for turn in turns]) for name in parts},
        "tokens_per_s_first_last": [round(turns[0].tokens_per_s, 1), round(last.tokens_per_s, 1)],
        "steady_tokens_per_s_first_last": [round(turns[0].steady_tokens_per_s, 1), round(last.steady_tokens_per_s, 1)],
        "same_answer_every_turn": len({turn.ids for turn in turns}) == 1,
        "growth_bytes": last.used_bytes - early.used_bytes,
    }


def _copied_per_s() -> float:
    """Measure bytes per second from pinned memory to the GPU, which is the most that the bus carries."""
    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    return source.numel() / best_seconds(lambda: target.copy_(source, non_blocking=True), "cuda")
