"""A model hub on loopback: as much of the hub's protocol as huggingface_hub asks for, with faults to order."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Faults:
    """The faults of the hub, by file name; empty for a healthy hub."""

    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes of each connection, then whole
    drip: dict[str, float] = field(default_factory=dict)  # seconds before every 256 KB but the first
    content: dict[str, bytes] = field(default_factory=dict)  # another content than was announced
    ignores_range: bool = False
    api_error: tuple[int, str] | None = None  # status and X-Error-Code of the repository itself
    file_error: tuple[int, str] | None = None  # of its weights
    renamed_to: str = ""
    no_sizes: bool = False
    silent: bool = False  # takes the question and never answers
    needs_token: str = ""


def start(tmp_path: Path, monkeypatch: Any, folder: Path) -> Iterator[Hub]:
    """Start a hub with the files of a folder, and make huggingface_hub use it. For a fixture."""
    hub = Hub(folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()


class Hub:
    """Serves the files of a folder as the repository `owner/name`, large ones by a redirect to another port."""

    def __init__(self, folder: Path, repo_id: str = "owner/name") -> None:
        self.repo_id = repo_id
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.large = {name for name in self.files if name.endswith((".safetensors", ".bin"))}
        self.faults = Faults()
        self.xet_store = ""
        self.xet_hashes: dict[str, str] = {}
        # (path, Range, Authorization) of every request, by server.
        self.asked: list[tuple[str, str, str]] = []
        self.cdn_asked: list[tuple[str, str, str]] = []
        self._servers = [self._serve(self._hub), self._serve(self._cdn)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, **faults: object) -> None:
        """Set the faults; earlier ones are removed."""
        self.faults = Faults(**faults)

    def asked_for(self, name: str) -> list[str]:
        """Return the Range header of every GET of a large file."""
        return [range_ for path, range_, _ in self.cdn_asked if path == f"/cdn/{name}"]

    def _serve(self, answer) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer(self)

            def do_HEAD(self) -> None:
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # clients that were killed
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def _hub(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        self.asked.append((path, request.headers.get("Range", ""), request.headers.get("Authorization", "")))
        faults, repo_id = self.faults, self.repo_id
        if faults.silent:
            time.sleep(3600)
        if faults.renamed_to and path.startswith(f"/api/models/{repo_id}"):
            return _reply(request, 307, {"Location": request.path.replace(repo_id, faults.renamed_to)})
        known = faults.renamed_to or repo_id
        if faults.needs_token and request.headers.get("Authorization") != f"Bearer {faults.needs_token}":
            return _reply(request, 401, {"X-Error-Message": "Invalid username or password."})
        if faults.api_error:
            return _reply(request, faults.api_error[0], {"X-Error-Code": faults.api_error[1]})
        if path == f"/api/models/{known}":
            return _reply(request, 200, {"Content-Type": "application/json"}, json.dumps(self._info(known)).encode())
        if path == f"/api/models/{known}/xet-read-token/{SHA}":
            answer = {"casUrl": self.xet_store, "accessToken": "t", "exp": int(time.time()) + 3600}
            return _reply(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode())
        prefix, _, name = path.rpartition("/")
        if prefix == f"/{known}/resolve/{SHA}" and name in self.files:
            return self._resolve(request, known, name)
        return _reply(request, 404, {"X-Error-Code": "RepoNotFound"})

    def _info(self, repo_id: str) -> dict:
        siblings = [{"rfilename": name, **self._metadata(name)} for name in self.files]
        return {"id": repo_id, "modelId": repo_id, "sha": SHA, "siblings": siblings, "tags": [], "private": False}

    def _metadata(self, name: str) -> dict:
        if self.faults.no_sizes:
            return {}
        content = self.files[name]
        sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"size": len(content), "blobId": sha1, **({"lfs": lfs} if name in self.large else {})}

    def _resolve(self, request: BaseHTTPRequestHandler, repo_id: str, name: str) -> None:
        if name not in self.large:
            return _send(request, self.faults.content.get(name, self.files[name]), {"X-Repo-Commit": SHA})
        if self.faults.file_error:
            return _reply(request, self.faults.file_error[0], {"X-Error-Code": self.faults.file_error[1]})
        headers = {
            # Signed, as the addresses of a real one are.
            "Location": f"{self.cdn_url}/cdn/{name}?Signature=secret",
            "X-Repo-Commit": SHA,
            "X-Linked-Size": str(len(self.files[name])),
            "X-Linked-Etag": f'"{hashlib.sha256(self.files[name]).hexdigest()}"',
        }
        if name in self.xet_hashes:
            route = f"{self.url}/api/models/{repo_id}/xet-read-token/{SHA}"
            headers |= {"X-Xet-Hash": self.xet_hashes[name], "Link": f'<{route}>; rel="xet-auth"'}
        return _reply(request, 302, headers)

    def _cdn(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        self.cdn_asked.append((path, request.headers.get("Range", ""), request.headers.get("Authorization", "")))
        name = path.removeprefix("/cdn/")
        content = self.faults.content.get(name, self.files[name])
        cuts = self.faults.cut_after.get(name)
        cut = cuts.pop(0) if cuts else None
        _send(request, content, {}, cut, self.faults.drip.get(name, 0), not self.faults.ignores_range)


def _reply(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b"") -> None:
    request.send_response(status)
    for key, value in {**headers, "Content-Length": str(len(body))}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)


def _send(
    request: BaseHTTPRequestHandler,
    content: bytes,
    headers: dict[str, str],
    cut_after: int | None = None,
    drip: float = 0.0,
    ranges: bool = True,
) -> None:
    """Send a content from the requested place on; the connection may end early, or every piece may be slow."""
    asked = request.headers.get("Range") if ranges else None
    start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
    rest = content[start:]
    request.send_response(206 if asked else 200)
    if asked:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    for key, value in {**headers, "Content-Length": str(len(rest))}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command == "HEAD":
        return
    try:
        for at in range(0, len(rest[:cut_after]), 1 << 18):
            time.sleep(drip if at else 0)
            request.wfile.write(rest[:cut_after][at : at + (1 << 18)])
        request.wfile.flush()
    except ConnectionError:  # the other side was killed
        request.close_connection = True
    if cut_after is not None:
        request.close_connection = True
