"""The parts of a measurement: lines with a name, a limit and a process, and the bench that they measure with."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import Ceiling, ceiling
from benchmarks.decode import PROMPTS
from benchmarks.measure import clock_for
from benchmarks.models import DECODE, SHAPES, build, prompt
from benchmarks.prefill import patch_embedding
from qwenvl.decoding.decoder import Decoder
from qwenvl.decoding.patch_embedding import patch_embedding_as_matmul

ROOT = Path(__file__).resolve().parents[2]
# Allocators of torch. ComfyUI sets the second one by default.
NATIVE, ASYNC = "backend:native", "backend:cudaMallocAsync"
# Device -> tokens of an answer, and rounds that count.
SIZES = {"cuda": (256, 3), "cpu": (24, 2)}


class NotMeasured(Exception):  # noqa: N818 (nothing went wrong)
    """A figure cannot be measured here; the text is a sentence that says why."""


@dataclass(frozen=True, slots=True)
class Line:
    """One entry of the results.

    Attributes:
        measure: returns figures that JSON can hold, or raises NotMeasured.
        seconds: its time limit.
        process: lines that follow one another with the same name here share a process and its bench.
        allocator: the allocator of that process.
    """

    name: str
    measure: Callable[[Bench], dict[str, Any]]
    seconds: int
    process: str = "model"
    allocator: str = NATIVE


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a run.

    Attributes:
        device: "cuda" or "cpu".
        shape: "4b" or "nano".
        comfyui: a checkout whose requirements this Python has; "" for no comparison.
    """

    device: str = "cuda"
    shape: str = "4b"
    comfyui: str = ""


class Bench:
    """The model, its inputs and its decoder, made at their first use and kept for later lines.

    Attributes:
        ends: when the present line must have ended, by time.monotonic().
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = options.device
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.tokens, self.rounds = SIZES[options.device]
        self.ends = float("inf")
        if options.device == "cpu":
            torch.set_num_threads(1)
        self.clock = clock_for(options.device)

    @cached_property
    def ceiling(self) -> Ceiling:
        """Return the limits of the device."""
        found = ceiling(self.device, self.dtype)
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return found

    @cached_property
    def convolution(self) -> Any:
        """Return the model's former patch embedding. The model gets a matrix product for it, as the pack loads it."""
        convolution = patch_embedding(self._built).proj
        patch_embedding_as_matmul(self._built)
        return convolution

    @cached_property
    def _built(self) -> Any:
        _ = self.ceiling  # measured first, so that its large buffers do not count in a model's peak
        return build(SHAPES[self.options.shape], self.device, self.dtype)

    @property
    def model(self) -> Any:
        """Return a Qwen3-VL of the shape, with random weights."""
        _ = self.convolution
        return self._built

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Return a prompt with a picture."""
        return prompt(self.model, *PROMPTS[self.options.shape])

    @cached_property
    def decoder(self) -> Decoder:
        """Return a decoder of the best tier that fits."""
        return Decoder(self.model, "sdpa", decode=DECODE)

    def share(self, tokens_per_s: float, bytes_per_token: int) -> dict[str, float]:
        """Return the ceiling that the memory sets, and the share of it."""
        most = self.ceiling.bytes_per_s / bytes_per_token
        return {"ceiling_tokens_per_s": round(most, 1), "ceiling_share": round(tokens_per_s / most, 3)}

    def program(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the repository's root, until the line's limit at most."""
        left = None if self.ends == float("inf") else self.ends - time.monotonic()
        return subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=left, check=False
        )

    def settle(self) -> None:
        """Wait for the device, so that a failure it has not reported yet counts for the line that caused it."""
        if self.device == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize()
