"""Every measurement that needs a GPU, in one command: python -m benchmarks.gpu [--quick]

Runs the GPU tests and the decode benchmark over shapes, tiers and contexts, under both allocators, each in a
process of its own, and writes benchmarks/results/<date>-<gpu>.json: one entry per run with its command and its
figures, or the end of its output where it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# ComfyUI sets the second one by default.
ALLOCATORS = ("backend:native", "backend:cudaMallocAsync")
# Patches of 16 pixels a side whose tokens, with 64 of text, make about 1k, 8k and 32k.
CONTEXTS = {"1k": 64, "8k": 180, "32k": 360}


def runs(quick: bool) -> list[list[str]]:
    """The benchmark's arguments, the most telling first, so that a run that is cut off has the best of them."""
    wanted = [["--shape", "4b", "--static"]]
    if not quick:
        wanted += [["--shape", shape] for shape in ("2b", "8b")]
        wanted += [["--shape", "4b", "--sampled"], ["--shape", "4b", "--tier", "generic step"]]
        wanted += [["--shape", "4b", "--image-side", str(CONTEXTS[name]), "--rounds", "2"] for name in ("8k", "32k")]
    return wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tests and one shape only")
    quick = parser.parse_args().quick
    done = [_tests()]
    for allocator in ALLOCATORS:
        for arguments in runs(quick or allocator != ALLOCATORS[0]):
            done.append(_run(["-m", "benchmarks.decode", "--device", "cuda", *arguments], allocator))
            _write(done)
    return 0


def _tests() -> dict[str, Any]:
    command = ["-m", "pytest", "-q", "tests/test_graph.py"]
    found = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    return {"command": " ".join(command), "status": found.returncode, "output": found.stdout[-2000:]}


def _run(command: list[str], allocator: str) -> dict[str, Any]:
    environment = dict(os.environ, PYTORCH_CUDA_ALLOC_CONF=allocator, PYTORCH_ALLOC_CONF=allocator)
    found = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    entry: dict[str, Any] = {"command": " ".join(command), "allocator": allocator, "status": found.returncode}
    lines = found.stdout.strip().splitlines()
    if found.returncode == 0 and lines:
        entry["result"] = json.loads(lines[-1])
    else:
        entry["output"] = found.stderr[-2000:]
    print(json.dumps(entry), flush=True)
    return entry


def _write(done: list[dict[str, Any]]) -> None:
    devices = [each["result"]["device"] for each in done if "result" in each]
    name = re.sub(r"\W+", "-", devices[0]).strip("-").lower() if devices else "gpu"
    path = RESULTS / f"{time.strftime('%Y-%m-%d')}-{name}.json"
    path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
