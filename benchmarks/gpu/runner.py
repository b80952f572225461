"""Lets workers measure lines, each within its limit, and ends a worker that fails or hangs."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from benchmarks.gpu.bench import ROOT, Line, Options

LINES = "benchmarks.gpu.lines"
# Seconds for a worker to import torch and the lines.
START_SECONDS = 90
LEAVE_SECONDS = 10
SHOWN = 3000


class _Ended(Exception):  # noqa: N818 (what it means is for the runner to say)
    """The worker has ended, or was too slow."""


class Worker:
    """A process that measures lines, one after the other.

    Args:
        module: the module whose lines() it measures.
    """

    def __init__(self, module: str, options: Options, line: Line) -> None:
        self.process = line.process
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._replies: queue.Queue[str] = queue.Queue()
        self._process: Any = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", module, json.dumps(asdict(options))],
            cwd=ROOT,
            env=dict(os.environ, PYTORCH_CUDA_ALLOC_CONF=line.allocator, PYTORCH_ALLOC_CONF=line.allocator),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=os.name == "posix",
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for reply in self._process.stdout:
            self._replies.put(reply)
        self._replies.put("")

    def reply(self, seconds: float) -> dict[str, Any]:
        """Return the worker's next reply.

        Raises:
            _Ended: no reply came, or not in time; the worker has been ended.
        """
        try:
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            self.end()
            raise _Ended(f"It took longer than {seconds:.0f} s.") from None
        if not reply:
            # The worker is about to end by itself, with a status that shows why.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(LEAVE_SECONDS)
            self.end()
            raise _Ended("")
        return json.loads(reply)

    def ask(self, name: str, seconds: float) -> dict[str, Any]:
        """Have a line measured, and return the reply."""
        with suppress(BrokenPipeError):  # then no reply comes either
            self._process.stdin.write(json.dumps({"line": name, "seconds": seconds}) + "\n")
            self._process.stdin.flush()
        return self.reply(seconds)

    def end(self) -> None:
        """End the worker and the processes that it started."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()

    def leave(self) -> None:
        """Let the worker end by itself: it has nothing more to do."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_SECONDS)
        self.end()

    def failure(self) -> dict[str, Any]:
        """Return how the ended worker ended, and the end of its output."""
        self._errors.seek(0)
        printed = self._errors.read().strip()
        last = printed.splitlines()[-1] if printed else ""
        return {"why": f"The process ended with status {self._process.returncode}: {last}", "printed": printed[-SHOWN:]}


class Runner:
    """Yields an entry for each line, as soon as it is known.

    Args:
        end: when all must have ended, by time.monotonic(): a line that may take longer is not started.
        module: the module in which a worker finds the lines.
    """

    def __init__(self, options: Options, end: float = float("inf"), module: str = LINES) -> None:
        self._options, self._end, self._module = options, end, module
        self._worker: Worker | None = None

    def run(self, lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
        try:
            for line in lines:
                started = time.monotonic()
                entry = {"line": line.name, **self._entry(line)}
                yield {**entry, "seconds": round(time.monotonic() - started, 1)}
            self._leave()
        finally:
            if self._worker:
                self._worker.end()

    def _leave(self) -> None:
        if self._worker:
            self._worker.leave()
        self._worker = None

    def _entry(self, line: Line) -> dict[str, Any]:
        if self._worker and self._worker.process != line.process:
            self._leave()
        needed = line.seconds + (0 if self._worker else START_SECONDS)
        if self._end - time.monotonic() < needed:
            return {"status": "no time left", "why": f"It may take {needed} s."}
        worker = self._worker or Worker(self._module, self._options, line)
        try:
            if worker is not self._worker:
                self._worker = worker
                worker.reply(START_SECONDS)
            return worker.ask(line.name, line.seconds)
        except _Ended as ended:
            self._worker = None
            if str(ended):
                return {"status": "timed out", **worker.failure(), "why": str(ended)}
            return {"status": "failed", **worker.failure()}
