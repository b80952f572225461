"""Every measurement that needs a GPU: python -m benchmarks.gpu [--part N] [--seconds S] [--comfyui CHECKOUT]

Each run is a process of its own and is written to the results as soon as it ends, so that a run that is cut off loses
only itself. The parts are about equally long; the first has the most telling runs, the last needs a checkout of ComfyUI
whose requirements this Python has. With --seconds, no run starts that may not end in time. The results are a JSON line
for each run: its command, its allocator, and its figures, or the end of its output where it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# ComfyUI sets the second one by default.
NATIVE, ASYNC = "backend:native", "backend:cudaMallocAsync"
LAST = 6


@dataclass(frozen=True, slots=True)
class Run:
    """A module with its arguments; the seconds are what it may take at most."""

    arguments: str
    seconds: int = 120
    allocator: str = NATIVE

    def command(self) -> list[str]:
        return [sys.executable, "-m", *shlex.split(self.arguments)]


def decode(arguments: str, seconds: int = 180, allocator: str = NATIVE) -> Run:
    return Run(f"benchmarks.decode --device cuda --rounds 3 {arguments}", seconds, allocator)


PARTS: dict[int, list[Run]] = {
    1: [
        Run("pytest -q -m gpu tests/decoding", 240),
        decode("--shape 4b"),
        decode("--shape 4b", allocator=ASYNC),
        decode("--shape 4b --sampled"),
        Run("benchmarks.prefill --shape 4b", 90),
    ],
    2: [
        decode("--shape 8b"),
        decode("--shape 2b"),
        decode("--shape 4b --tier 'generic step'"),
        Run("benchmarks.steady --shape 4b --runs 20", 150),
        Run("benchmarks.steady --shape 4b --runs 20", 150, ASYNC),
    ],
    3: [
        decode("--shape 4b --image-side 180"),
        decode("--shape 4b --image-side 180 --step-attention sdpa"),
        decode("--shape 4b --step-attention sdpa"),
        decode("--shape 4b --tier 'generic step' --image-side 180"),
        # Two rounds: prompts of 32k tokens.
        decode("--shape 4b --image-side 360 --rounds 2 --tokens 128", 200),
    ],
    4: [
        decode("--shape 4b --quantization 4bit"),
        decode("--shape 4b --quantization 8bit --tokens 64"),
        Run("benchmarks.kernels --shape 4b", 90),
        Run("benchmarks.kernels --shape 4b --image-side 180", 90),
    ],
    # It waits for a compiler.
    5: [decode("--shape 4b --static", 300)],
}


def with_comfyui(checkout: Path) -> list[Run]:
    """ComfyUI's memory manager beside ours, and its own model against ours."""
    where = shlex.quote(str(checkout.resolve()))
    alternate = [Run(f"benchmarks.alternate {where} --turns 20", 180, each) for each in (NATIVE, ASYNC)]
    return [
        *alternate,
        Run(f"benchmarks.comfyui {where} --shape 4b --device cuda --dtype bfloat16 --rounds 3", 180, ASYNC),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=[*PARTS, LAST], action="append", help="may be given several times")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all runs together")
    parser.add_argument("--comfyui", type=Path, help="a checkout, for the last part")
    options = parser.parse_args()
    parts = {**PARTS, LAST: with_comfyui(options.comfyui) if options.comfyui else []}
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    results = options.results / f"{time.strftime('%Y-%m-%d')}-{name}.jsonl"
    end = time.monotonic() + options.seconds
    failed = 0
    for part in options.part or parts:
        for run in parts[part]:
            left = end - time.monotonic()
            if left < run.seconds / 3:
                print(f"no time left for {run.arguments}", flush=True)
                continue
            entry = _run(run, min(left, run.seconds))
            failed += entry["status"] != 0
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), flush=True)
    return failed


def _run(run: Run, timeout: float) -> dict[str, Any]:
    environment = dict(os.environ, PYTORCH_CUDA_ALLOC_CONF=run.allocator, PYTORCH_ALLOC_CONF=run.allocator)
    start = time.monotonic()
    entry: dict[str, Any] = {"run": run.arguments, "allocator": run.allocator}
    try:
        found = subprocess.run(
            run.command(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {**entry, "status": "timed out", "seconds": round(timeout)}
    entry |= {"status": found.returncode, "seconds": round(time.monotonic() - start)}
    lines = found.stdout.strip().splitlines()
    if found.returncode == 0 and lines and lines[-1].startswith("{"):
        return {**entry, "result": json.loads(lines[-1])}
    return {**entry, "output": found.stdout[-2000:], "errors": found.stderr[-2000:]}


if __name__ == "__main__":
    sys.exit(main())
