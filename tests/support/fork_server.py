"""A process that has imported everything and forks a new one for every order: python fork_server.py < orders

A test can then kill the forked process while it works, and not during seconds of imports. An order is a line of JSON:
{"do": [function, arguments], "environment": {}, "log": file, "longest_file": bytes or null}. The answers are
{"pid": ...} at once and {"status": ..., "seconds": ...} when it has ended; status is negative for a signal.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# Much of transformers is imported only when it is used. Nothing is done with it here, which would start threads.
_QWEN = "transformers.models.qwen"
IMPORTS = ("qwenvl.__main__", "qwenvl.pipeline", "accelerate", "torchvision", f"{_QWEN}3_vl.modeling_qwen3_vl")
IMPORTS += (f"{_QWEN}3_vl.processing_qwen3_vl", f"{_QWEN}2_vl.image_processing_qwen2_vl")
# Far longer than anything takes.
PATIENCE_S = 120
ROOT = Path(__file__).resolve().parents[2]


class Server:
    """Starts the server and sends it orders. For a fixture."""

    def __init__(self, environment: dict[str, str]) -> None:
        command, pipe = [sys.executable, __file__], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def close(self) -> None:
        self._process.communicate()

    def start(self, log: Path, *do: Any, **order: Any) -> Run:
        log.write_text("")  # what an earlier one said is not this one's
        line = json.dumps({"do": do, "log": str(log), "environment": {}, "longest_file": None} | order)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return Run(self, self.answer()["pid"], log)

    def answer(self) -> dict[str, Any] | None:
        """Return the next answer; None if none comes in time."""
        there, _, _ = select.select([self._process.stdout], [], [], PATIENCE_S)
        return json.loads(self._process.stdout.readline()) if there else None


class Run:
    """A forked process that follows an order."""

    def __init__(self, server: Server, pid: int, log: Path) -> None:
        self._server, self.pid, self._log = server, pid, log
        self.began = time.monotonic()

    def wait_for(self, condition: Any) -> None:
        """Wait until the condition is true, checked a thousand times a second."""
        while not condition():
            if time.monotonic() > self.began + PATIENCE_S:
                self._fail()
            time.sleep(0.001)

    def said(self) -> str:
        return self._log.read_text()

    def kill(self) -> int:
        """Kill the process by SIGKILL; return its status."""
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.pid, signal.SIGKILL)
        return self.end()[0]

    def end(self) -> tuple[int, float]:
        """Wait for the process; return its status and seconds."""
        answer = self._server.answer()
        if answer is None:
            self._fail()
        return answer["status"], answer["seconds"]

    def _fail(self) -> NoReturn:
        """Make a process that hangs print where it is."""
        os.kill(self.pid, signal.SIGABRT)
        self._server.answer()
        raise AssertionError(self.said())


class NoWatch:
    """A watch of a download that does nothing."""

    def check(self) -> None: ...

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None: ...


def command(*arguments: str) -> int:
    from qwenvl.__main__ import main

    return main(arguments)


def fetch(repo_id: str, folder: str) -> int:
    from qwenvl.models.download import fetch

    fetch(repo_id, Path(folder), NoWatch())
    return 0


def audited(base: str, told: str) -> int:
    from audited import work

    return work(base, told)


def _work(order: dict[str, Any]) -> int:
    os.environ.update(order["environment"])
    log = os.devnull if order["longest_file"] is not None else order["log"]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    faulthandler.enable()
    if order["longest_file"] is not None:
        # A write beyond it stops half-way there, and the next one ends the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["longest_file"], resource.RLIM_INFINITY))
    function, *arguments = order["do"]
    return {"command": command, "fetch": fetch, "audited": audited}[function](*arguments)


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    for name in IMPORTS:
        importlib.import_module(name)
    # A lock that another thread holds at the moment of a fork is never released in the child.
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads"
    # Not `for line in`, which reads ahead.
    while line := sys.stdin.readline():
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = _work(json.loads(line))
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(json.dumps({"pid": pid}), flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    _serve()
