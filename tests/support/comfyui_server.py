"""A real ComfyUI server for the tests, and a client that runs graphs and records what a browser sees."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

websocket = pytest.importorskip("websocket", reason="The ComfyUI tests need: pip install websocket-client")

PACK = Path(__file__).resolve().parents[2]
START_LIMIT_S = 240.0
RUN_LIMIT_S = 180.0
STOP_LIMIT_S = 10.0
LIVE_TEXT = 3  # number of ComfyUI's binary websocket event that carries progress text
# One thread is fastest for a model this small; on a busy machine several would mostly wait for each other.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

Graph = dict[str, dict[str, Any]]


class ServerError(RuntimeError):
    """The server did not start, stopped, or did not answer in time."""


@dataclass
class Run:
    """The result of one graph.

    status is "running" until it is one of: success, error, interrupted, refused. message is the reason of an error or
    of a refusal. outputs is what /history holds: node id -> {"text": [...]}.
    """

    prompt_id: str = ""
    status: str = "running"
    message: str = ""
    ended_at: float = 0.0
    progress: list[tuple[float, float]] = field(default_factory=list)
    live: list[tuple[str, str]] = field(default_factory=list)
    cached: set[str] = field(default_factory=set)
    outputs: dict[str, Any] = field(default_factory=dict)

    def text(self, node: str) -> str:
        """Return the text that a preview node showed. If the run failed, the error holds its message."""
        assert self.status == "success", f"{self.status}: {self.message}"
        return str(self.outputs[node]["text"][0])

    def end(self, status: str, message: str = "") -> None:
        self.status, self.message, self.ended_at = status, message, time.monotonic()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """ComfyUI's main.py on the CPU. All that it writes goes below base; the checkout is only read."""

    def __init__(
        self,
        checkout: Path,
        python: str,
        base: Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        self.base = base
        self._options = options
        self.port = free_port()
        self.client = Client(f"127.0.0.1:{self.port}")
        self.start_log = ""
        self._log_file = base / "server.log"
        for folder in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (base / folder).mkdir(exist_ok=True)
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(python),
                cwd=checkout,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def _command(self, python: str) -> list[str]:
        database = f"sqlite:///{(self.base / 'comfyui.db').as_posix()}"
        options = ["--base-directory", str(self.base), "--database-url", database]
        return [python, "main.py", "--cpu", "--port", str(self.port), "--disable-auto-launch", *options, *self._options]

    def log(self) -> str:
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            ServerError: it ended or did not answer in time; the message holds its log.
        """
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.client.answers():
                self.start_log = self.log()
                return
            time.sleep(0.3)
        why = f"exit code {self._process.poll()}" if self._process.poll() is not None else "no answer"
        raise ServerError(f"ComfyUI did not start ({why}). Its log:\n{self.log()}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_LIMIT_S)


def with_the_pack(base: Path, options: Sequence[str] = (), environment: Mapping[str, str] = ENVIRONMENT) -> Server:
    """Start the ComfyUI in COMFYUI_DIR, with this checkout as its custom node."""
    (base / "custom_nodes").mkdir(exist_ok=True)
    (base / "custom_nodes" / "ComfyUI_QwenVL").symlink_to(PACK, target_is_directory=True)
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    return Server(Path(os.environ["COMFYUI_DIR"]).resolve(), python, base, [*options, *_frontend()], environment)


def _frontend() -> list[str]:
    """Return the options for the page in COMFYUI_FRONTEND, in place of the interpreter's own: its folder, or one into
    which pip put comfyui-frontend-package."""
    named = os.environ.get("COMFYUI_FRONTEND")
    if not named:
        return []
    packed = Path(named).resolve() / "comfyui_frontend_package" / "static"
    return ["--front-end-root", str(packed if packed.is_dir() else Path(named).resolve())]


class Client:
    """Does what a browser tab does. address is "host:port"."""

    def __init__(self, address: str) -> None:
        self.address = address

    def answers(self) -> bool:
        try:
            return self.get("/system_stats") is not None
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as reply:
            return json.load(reply)

    def post(self, path: str, data: dict[str, Any]) -> tuple[int, Any]:
        """Return (HTTP status, JSON reply, or None if the reply is empty)."""
        request = urllib.request.Request(
            f"http://{self.address}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                status, body = reply.status, reply.read()
        except urllib.error.HTTPError as refusal:
            status, body = refusal.code, refusal.read()
        return status, json.loads(body) if body else None

    def run(self, graph: Graph, after_event: Callable[[Run], None] | None = None) -> Run:
        """Run the graph to its end and return what came back; after_event sees the run after every event."""
        client_id = uuid.uuid4().hex
        browser = websocket.create_connection(f"ws://{self.address}/ws?clientId={client_id}", timeout=30)
        try:
            return self._post_and_follow(browser, client_id, graph, after_event or _ignore)
        finally:
            browser.close()

    def _post_and_follow(self, browser: Any, client_id: str, graph: Graph, after_event: Callable[[Run], None]) -> Run:
        status, reply = self.post("/prompt", {"prompt": graph, "client_id": client_id})
        run = Run()
        if status != HTTPStatus.OK:
            run.end("refused", json.dumps(reply, ensure_ascii=False))
            return run
        run.prompt_id = reply["prompt_id"]
        deadline = time.monotonic() + RUN_LIMIT_S
        while run.status == "running":
            browser.settimeout(max(0.1, deadline - time.monotonic()))
            record_event(run, browser.recv())
            after_event(run)
        if run.status == "success":
            run.outputs = self._outputs(run.prompt_id)
        return run

    def _outputs(self, prompt_id: str) -> dict[str, Any]:
        """Return the prompt's entry in /history, which ComfyUI writes just after the last event."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return dict(history[prompt_id]["outputs"])
            time.sleep(0.05)
        raise ServerError(f"/history has no entry for prompt {prompt_id} after 10 s.")


def _ignore(run: Run) -> None:
    """Do nothing after an event."""


def record_event(run: Run, event: str | bytes) -> None:
    """Add one websocket message, text or binary, to the run."""
    if isinstance(event, bytes):
        _record_binary(run, event)
        return
    message = json.loads(event)
    data = message.get("data", {})
    if data.get("prompt_id") == run.prompt_id:
        _record_message(run, message["type"], data)


def _record_binary(run: Run, event: bytes) -> None:
    """Read a live text: kind (4 bytes), length of the node id (4 bytes), node id, text."""
    kind, length = struct.unpack_from(">II", event)
    if kind == LIVE_TEXT:
        node, text = event[8 : 8 + length], event[8 + length :]
        run.live.append((node.decode(), text.decode()))


def _record_message(run: Run, kind: str, data: dict[str, Any]) -> None:
    match kind:
        case "progress":
            run.progress.append((data["value"], data["max"]))
        case "execution_cached":
            run.cached.update(data["nodes"])
        case "execution_success":
            run.end("success")
        case "execution_interrupted":
            run.end("interrupted")
        case "execution_error":
            run.end("error", data["exception_message"])
