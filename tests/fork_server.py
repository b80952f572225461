"""A process that has imported everything and forks one that works for every order: python fork_server.py PICTURE

What is killed is then a process of its own, and killed while it works, not in the seconds of its imports. An order is a
line of JSON: {"do": [function, arguments], "environment": {}, "log": file, "longest_file": bytes or null}. The answers
are {"pid": ...} at once and {"status": ..., "seconds": ...} when it has ended; status is negative for a signal.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """For a fixture: starts it, and gives it orders."""

    def __init__(self, picture: Path, environment: dict[str, str]) -> None:
        command, pipe = [sys.executable, __file__, str(picture)], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def close(self) -> None:
        self._process.communicate()

    def start(self, log: Path, *do: Any, **order: Any) -> Run:
        line = json.dumps({"do": do, "log": str(log), "environment": {}, "longest_file": None} | order)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return Run(self, self.answer()["pid"], log)

    def answer(self) -> dict[str, Any]:
        return json.loads(self._process.stdout.readline())


class Run:
    """A process at work."""

    def __init__(self, server: Server, pid: int, log: Path) -> None:
        self._server, self.pid, self._log = server, pid, log
        self.began = time.monotonic()

    def wait_for(self, condition: Any) -> None:
        """Until it is true, looked at a thousand times a second."""
        while not condition():
            if time.monotonic() > self.began + 120:
                self.kill()
                raise AssertionError(self.said())
            time.sleep(0.001)

    def said(self) -> str:
        return self._log.read_text()

    def kill(self) -> int:
        """SIGKILL; returns the status."""
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.pid, signal.SIGKILL)
        return self.end()[0]

    def end(self) -> tuple[int, float]:
        """Waits for it: status and seconds."""
        answer = self._server.answer()
        return answer["status"], answer["seconds"]


class Nobody:
    """Watches a download and says nothing."""

    def check(self) -> None: ...

    def report(self, done: int, total: int, text: str) -> None: ...


def command(*arguments: str) -> int:
    from qwenvl.__main__ import main

    return main(arguments)


def fetch(repo_id: str, folder: str) -> int:
    from qwenvl.download import fetch

    fetch(repo_id, Path(folder), Nobody())
    return 0


def _work(order: dict[str, Any]) -> int:
    os.environ.update(order["environment"])
    log = os.devnull if order["longest_file"] is not None else order["log"]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    if order["longest_file"] is not None:
        # A write beyond it stops half-way there, and the next one ends the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["longest_file"], resource.RLIM_INFINITY))
    function, *arguments = order["do"]
    return {"command": command, "fetch": fetch}[function](*arguments)


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)  # a process that has more cannot be forked
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        # Much of transformers is imported only when it is used.
        command("Count from 1 to 3.", "--image", sys.argv[1])
    logging.getLogger().handlers.clear()  # each command sets its own
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
