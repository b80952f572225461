"""Downloads a model folder and checks that it is complete. Standard library only: another process downloads."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..checks import shown
from ..files.bounded_json import UnreadableError
from ..files.headers import BrokenWeightsError, RivalWeightsError, headers
from ..log import amount, log
from ..settings import DOWNLOADS
from .hub_errors import redacted
from .transfer import UNFINISHED
from .trust import links_out

_PACK = Path(__file__).resolve().parents[2]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Seconds between two looks at a cancel while nothing arrives.
_LOOK_S = 0.1
# Seconds between two updates of the progress bar and its text, and between two lines of the log.
_REPORT_S = 0.5
_LOG_S = 15.0
# The speed shown is the mean of the last seconds.
_SPEED_OVER_S = 10.0


class DownloadError(RuntimeError):
    """A model could not be downloaded, or must not be."""


class DownloadWatch(Protocol):
    """Receives the progress of a download, and can cancel it."""

    def check(self) -> None:
        """Raise to cancel."""

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None:
        """Show the progress: `done` of `total` bytes, and a line of text."""


def why_incomplete(folder: Path) -> str | None:
    """Return why the folder is not a complete model, or None. Reads only headers of weights; opens no links out."""
    try:
        if linked := links_out(folder):
            return next(iter(linked.values()))
        return "its download has not finished" if (folder / UNFINISHED).exists() else _why_not_whole(folder)
    except (RivalWeightsError, BrokenWeightsError) as error:
        return str(error)
    except UnreadableError as error:
        return f"its index cannot be read ({error.reason})"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"its index or a weight file cannot be read ({shown(str(error))})"


def default_policy() -> str:
    """Return the policy in QWENVL_DOWNLOAD. An unknown word counts as "never": it was set to forbid something."""
    policy = os.environ.get("QWENVL_DOWNLOAD", DOWNLOADS[0]).strip().lower()
    if policy in DOWNLOADS:
        return policy
    log.warning("QWENVL_DOWNLOAD is %r, but must be one of %s: taken as never", policy, ", ".join(DOWNLOADS))
    return "never"


def why_forbidden(policy: str) -> str | None:
    """Return why nothing may be downloaded now, or None."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{name} is set"
    return "the download policy is never" if policy == "never" else None


def command(repo_id: str, folder: Path) -> str:
    """Return the command with which a user can download it."""
    return f'hf download {repo_id} --local-dir "{folder}"'


def fetch(repo_id: str, folder: Path, watch: DownloadWatch) -> None:
    """Download a repository into the folder, or go on with an earlier download.

    Raises:
        DownloadError: it could not be downloaded, or it is not a complete model.
        what watch.check raises: the download has stopped; what has come so far stays.
    """
    watch.check()
    log.info("downloading %s to %s", repo_id, folder)
    progress = _Progress(repo_id, watch)
    try:
        for event in _events(repo_id, folder, watch):
            progress.take(event)
            if "note" in event:
                log.warning("%s", event["note"])
            if "error" in event:
                raise DownloadError(event["error"])
    finally:
        if progress.is_partial():
            log.warning("download of %s stopped at %s; the next one goes on from there", repo_id, progress.amounts())
    if reason := why_incomplete(folder):
        raise DownloadError(f"{repo_id} was fetched to {folder}, but {reason}, so it cannot be loaded.")
    log.info("downloaded %s in %.0f s", repo_id, progress.seconds())


class _Progress:
    """Progress and speed of a download."""

    def __init__(self, repo_id: str, watch: DownloadWatch) -> None:
        self._name = repo_id.rpartition("/")[2]
        self._watch = watch
        self._done = self._total = self._got = self._to_check = 0
        self._start = self._logged_at = time.monotonic()
        self._reported_at = 0.0
        self._received: deque[tuple[float, int]] = deque([(self._start, 0)])

    def take(self, event: dict[str, Any]) -> None:
        """Take an event of the other process; it is empty if nothing came for a moment."""
        self._total = event.get("total", self._total)
        self._done = event.get("done", self._done)
        self._got = event.get("received", self._got)
        self._to_check = event.get("to_check", self._to_check)
        if "checked" in event and not self._total:
            self._report_check(event["checked"])
        now = time.monotonic()
        if now - self._received[-1][0] >= _LOOK_S:
            self._received.append((now, self._got))
            while now - self._received[0][0] > _SPEED_OVER_S and len(self._received) > 2:
                self._received.popleft()
        if self._total and (now - self._reported_at >= _REPORT_S or self._done == self._total):
            self._reported_at = now
            self._watch.report(self._done, self._total, f"Downloading {self._name}: {self.so_far()}")
        if self._total and now - self._logged_at >= _LOG_S:
            self._logged_at = now
            log.info("%s: %s", self._name, self.so_far())

    def _report_check(self, checked: int) -> None:
        """Show how much of the files that were there already is checked. That takes minutes for tens of gigabytes."""
        text = f"Checking the files of {self._name} that are there: {amount(checked, self._to_check)}"
        self._watch.report(checked, self._to_check, text, "checking")
        if time.monotonic() - self._logged_at >= _LOG_S:
            self._logged_at = time.monotonic()
            log.info("%s", text)

    def is_partial(self) -> bool:
        return 0 < self._done < self._total

    def amounts(self) -> str:
        """2.1 of 8.9 GB"""
        return amount(self._done, self._total)

    def so_far(self) -> str:
        """2.1 of 8.9 GB, 85.0 MB/s, 80 s left"""
        (first, before), (last, now) = self._received[0], self._received[-1]
        if now == before:
            return self.amounts()
        speed = (now - before) / (last - first)
        left = (self._total - self._done) / speed
        return (
            f"{self.amounts()}, {speed / 1e6:.1f} MB/s, {f'{left / 60:.0f} min' if left > 90 else f'{left:.0f} s'} left"
        )

    def seconds(self) -> float:
        return time.monotonic() - self._start


def _events(repo_id: str, folder: Path, watch: DownloadWatch) -> Iterator[dict[str, Any]]:
    """Yield the other process's events until it ends, and {} if nothing comes for a moment.

    The process is killed when the generator is closed.
    """
    event: dict[str, Any] | None = {}
    with _start(repo_id, folder) as process:
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        # Kept in memory and not in a file, because the disk may be full.
        last_words: deque[str] = deque(maxlen=1)
        listeners = [
            threading.Thread(target=_listen, args=(process, events), name="qwenvl-download", daemon=True),
            threading.Thread(target=last_words.extend, args=(process.stderr,), name="qwenvl-complaints", daemon=True),
        ]
        for listener in listeners:
            listener.start()
        try:
            while event is not None and "complete" not in event:
                watch.check()
                event = _next(events)
                yield event or {}
        finally:
            process.kill()
            for listener in listeners:
                listener.join()  # it reads from a pipe that is about to be closed
        if event is None:
            process.wait()
            raise DownloadError(
                f"The process that downloads {repo_id} ended by itself "
                f"({redacted(''.join(last_words)) or f'status {process.returncode}'}). "
                f"Try again, or run: {command(repo_id, folder)}"
            )


def _next(events: queue.SimpleQueue[dict[str, Any] | None]) -> dict[str, Any] | None:
    try:
        return events.get(timeout=_LOOK_S)
    except queue.Empty:
        return {}


def _start(repo_id: str, folder: Path) -> subprocess.Popen[str]:
    # -c, because an embedded Python, as in portable ComfyUI, does not search the current or the script's folder.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from qwenvl.models import download, transfer; "
        "sys.exit(transfer.main(*sys.argv[2:], download.why_incomplete))"
    )
    # Xet may give up early, since HTTP goes on from there; hf_transfer can neither resume nor report its progress.
    environment = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", **os.environ}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ENABLE_HF_TRANSFER": "0"}
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", code, str(_PACK), repo_id, str(folder.absolute())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        encoding="utf-8",
        errors="replace",
        # No console window on Windows.
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )


def _listen(process: subprocess.Popen[str], events: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    if process.stdout:
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                events.put(json.loads(line))
    events.put(None)


def _why_not_whole(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return "the tokenizer is missing"
    return None if headers(folder) else f"it holds no .safetensors weights{_pickles(folder)}"


def _pickles(folder: Path) -> str:
    """Name a pickle that is there in place of safetensors weights, for the message; "" if there is no pickle."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if not found:
        return ""
    return f", only {found[0]}: a pickle can run code when it is read, so none is ever opened"
