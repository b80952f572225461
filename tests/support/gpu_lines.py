"""Lines for a worker of benchmarks.gpu that fail in every way, each between two that succeed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import ASYNC, Bench, Line, NotMeasured, Options

LIMIT = 30
SHORT = 2


def fine(bench: Bench) -> dict[str, Any]:
    """Return the process id, and how many lines this bench has measured."""
    bench.seen = getattr(bench, "seen", 0) + 1
    return {"process": os.getpid(), "seen": bench.seen, "allocator": os.environ["PYTORCH_CUDA_ALLOC_CONF"]}


def absent(bench: Bench) -> dict[str, Any]:
    raise NotMeasured("There is no such thing here.")


def raises(bench: Bench) -> dict[str, Any]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def chatters(bench: Bench) -> dict[str, Any]:
    """Print as libraries do, in Python and below it."""
    print('{"status": "measured", "result": "not by the line"}', flush=True)
    ctypes.CDLL(None).puts(b"from below")
    ctypes.CDLL(None).fflush(None)
    return fine(bench)


def unwritable(bench: Bench) -> dict[str, Any]:
    return {"figure": object()}


def leaves(bench: Bench) -> dict[str, Any]:
    os._exit(7)


def crashes(bench: Bench) -> dict[str, Any]:
    return {"figure": ctypes.string_at(0)}


def stuck_here(bench: Bench) -> dict[str, Any]:
    """Hang together with a program that it started, whose process id is in a file."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(bench.options.comfyui).write_text(str(started.pid))
    time.sleep(600)
    return {}


FAULTS = (raises, unwritable, leaves, crashes)


def lines(options: Options) -> list[Line]:
    found = [Line("first", fine, LIMIT), Line("absent", absent, LIMIT), Line("chatters", chatters, LIMIT)]
    for fault in FAULTS:
        found += [Line(fault.__name__, fault, LIMIT), Line(f"after-{fault.__name__}", fine, LIMIT)]
    found += [Line("stuck_here", stuck_here, SHORT), Line("after-stuck_here", fine, LIMIT)]
    return [*found, Line("elsewhere", fine, LIMIT, "elsewhere", ASYNC)]
