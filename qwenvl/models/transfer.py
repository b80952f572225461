"""Downloads one repository, in a process of its own that download.py starts.

Only a process can be stopped within a second whatever it waits for: a name that does not resolve, a silent server,
Xet's own threads. huggingface_hub finds the repository, sends the token, follows mirrors and redirects and repairs cut
connections. Writing is done here, because huggingface_hub 2 keeps nothing of an interrupted file: here it lies beside
its place as <name>.<hash>.part, and is moved there only when its size and its hash are right.

The process reports as one JSON object a line on standard output, and ends when its standard input closes, so it never
outlives its parent. What differs between versions of huggingface_hub is in this file and hub_errors.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, cast

from ..files.bounded_json import read_json_object
from ..files.headers import INDEX
from ..files.locks import FileLock
from ..log import amount
from .hub_errors import TransferError, endpoint, expected_errors, explain, is_broken_line, is_full_disk, redacted
from .part import InPlace, Part, RemoteFile

# Weights as safetensors, and the files of the tokenizer and the processor. Never pickles, never code.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
# Exists while a download is unfinished, so that a folder without some of its files never counts as complete. It holds
# the hashes of the files that are in place.
UNFINISHED = ".download-unfinished"
LOCK = ".download-lock"
# Files at a time: one connection rarely uses all of the bandwidth.
_CONNECTIONS = 4
# Bytes per write: the most that a cancel loses of a file, and the step of the progress.
_CHUNK = 1 << 18
# Tries without a new byte before a file is given up. huggingface_hub retries by itself within each.
_IDLE_TRIES = 2

Judge = Callable[[Path], str | None]


def main(repo_id: str, into: str, why_incomplete: Judge) -> None:
    """Download it; the last line of output reports that it is complete, or why not."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import huggingface_hub.constants

    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = _CHUNK
    folder = Path(into)
    transfer = Transfer(repo_id, folder, _say, why_incomplete)
    try:
        transfer.run()
    except expected_errors() as error:
        _say(error=explain(error, transfer.repo_id, folder))
        # sys.exit would wait for the threads, and they for their servers. What they have is on disk.
        os._exit(2)
    _say(complete=True)


class Transfer:
    """The download of one repository into a folder.

    Args:
        say: called with each event, as keywords.
        why_incomplete: returns why the folder is not a complete model, or None.
    """

    def __init__(self, repo_id: str, folder: Path, say: Callable[..., None], why_incomplete: Judge) -> None:
        self.repo_id = repo_id
        self._folder = folder
        self._say = say
        self._why_incomplete = why_incomplete
        self._revision = ""
        self._xet: Any = None
        self._lock = threading.Lock()
        self._done = self._received = self._checked = 0

    def run(self) -> None:
        """Download what is missing. The folder is created only when the repository is known to exist."""
        files = self._list()
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._folder / LOCK)
        # This wait needs no check for a cancel, which ends the process.
        lock.wait(lambda: self._say(note=f"another process is downloading to {self._folder}; waiting for it"))
        try:
            # Another process may have completed the folder meanwhile; then it is in use and not marked as unfinished.
            if self._why_incomplete(self._folder):
                self._fetch(files)
        finally:
            lock.release()

    def _list(self) -> list[RemoteFile]:
        from huggingface_hub import HfApi, constants

        info = HfApi().model_info(self.repo_id, files_metadata=True, timeout=30)
        if info.id and info.id != self.repo_id:
            self._say(note=f"{self.repo_id} is now called {info.id}: use the new name")
            self.repo_id = info.id
        self._revision = info.sha or constants.DEFAULT_REVISION
        files = [self._remote(sibling) for sibling in info.siblings or () if _wanted(sibling.rfilename)]
        if not any(file.name.endswith(".safetensors") for file in files):
            raise TransferError(f"{self.repo_id} holds no .safetensors weights, so nothing of it can be used.")
        return files

    def _remote(self, sibling: Any) -> RemoteFile:
        if sibling.size is None:
            raise TransferError(f"{endpoint()} does not say how large {sibling.rfilename} is: use another mirror.")
        sha256 = sibling.lfs.sha256 if sibling.lfs else ""
        return RemoteFile(sibling.rfilename, sibling.size, sha256, sibling.blob_id or "")

    def _fetch(self, files: list[RemoteFile]) -> None:
        marker = self._folder / UNFINISHED
        self._in_place = InPlace(self._folder, marker)
        # Weights that the index does not name are not part of the model, e.g. the same ones in another format.
        if index := next((file for file in files if file.name == INDEX), None):
            self._bring(index)
            files = [file for file in files if not file.name.endswith(".safetensors") or file.name in self._shards()]
        self._say(to_check=self._to_check(files))
        self._require_disk(files)
        self._done = self._received = 0
        self._say(total=sum(file.size for file in files))
        self._xet = _xet_session()
        pool = ThreadPoolExecutor(_CONNECTIONS)
        # Small files first, since they are done at once.
        under_way = [pool.submit(self._bring, file) for file in sorted(files, key=lambda file: file.size)]
        for ended in wait(under_way, return_when=FIRST_EXCEPTION).done:
            ended.result()
        for left_over in self._folder.glob("*.????????????.part"):
            left_over.unlink()
        marker.unlink()

    def _shards(self) -> set[str]:
        return set(read_json_object(self._folder / INDEX)["weight_map"].values())

    def _to_check(self, files: list[RemoteFile]) -> int:
        """Return the bytes of files that were not downloaded here, and have to be read to compare their hashes."""
        return sum(file.size for file in self._in_place.unknown(files))

    def _require_disk(self, files: list[RemoteFile]) -> None:
        missing = 0
        for file in files:
            if not self._in_place.has(file, self._check):
                part = file.part_path(self._folder)
                missing += file.size - (part.stat().st_size if part.exists() else 0)
        free = shutil.disk_usage(self._folder).free
        if missing > free:
            raise TransferError(
                f"{self.repo_id} needs {amount(missing)} more on the disk of {self._folder}, and {amount(free)} are "
                "free. Make room, or give ComfyUI a folder on another disk as LLM in extra_model_paths.yaml."
            )

    def _bring(self, file: RemoteFile) -> None:
        """Bring one file to its place, unless it is there."""
        if self._in_place.has(file, self._check):
            self._have(file.size)
            return
        part = Part(file, self._folder, lambda count: self._tell(count, received=max(count, 0)), self._have)
        try:
            if part.size < file.size:
                self._receive(file, part)
        finally:
            part.close()
        if reason := part.why_wrong():
            part.path.unlink()
            raise TransferError(
                f"{file.name} of {self.repo_id} arrived damaged: {reason}. It was thrown away, the other files are "
                f"kept. Try again; if it stays so, {endpoint()} serves a wrong file."
            )
        part.path.replace(self._folder / file.name)
        self._in_place.note(file)

    def _receive(self, file: RemoteFile, part: Part) -> None:
        """Download the rest of a file. After a broken connection, try again as long as every try brings some bytes."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repo_id, file.name, revision=self._revision)
        if file.sha256 and self._receive_by_xet(file, part, url):
            return
        idle = 0
        while True:
            before = part.size
            try:
                _receive_by_http(file, part, url)
            except expected_errors() as error:
                idle = 0 if part.size > before else idle + 1
                if idle == _IDLE_TRIES or not is_broken_line(error):
                    raise
                time.sleep(1)
            else:
                return

    def _receive_by_xet(self, file: RemoteFile, part: Part, url: str) -> bool:
        """Download the rest of a file by Xet, which is faster; False if that is not possible."""
        xet = self._xet and _xet_data(url)
        if not xet:
            return False
        from hf_xet import XetFileInfo
        from huggingface_hub.utils import build_hf_headers

        try:
            group = self._xet.new_download_stream_group(
                token_refresh_url=xet.refresh_route, token_refresh_headers=build_hf_headers()
            )
            for data in group.download_stream(XetFileInfo(xet.file_hash, file.size), start=part.size):
                part.write(data)
            if part.size < file.size:
                raise OSError("it ended early")
        except (OSError, RuntimeError) as error:
            if is_full_disk(error):
                raise
            self._xet = None
            self._say(note=f"{file.name}: Xet failed ({redacted(str(error))}); going on over HTTP")
            return False
        return True

    def _tell(self, count: int, received: int) -> None:
        with self._lock:
            self._done += count
            self._received += received
            self._say(done=self._done, received=self._received)

    def _have(self, count: int) -> None:
        self._tell(count, received=0)

    def _check(self, count: int) -> None:
        """Report that `count` more bytes of a file that was there already have been read."""
        with self._lock:
            self._checked += count
            self._say(checked=self._checked)


def _receive_by_http(file: RemoteFile, part: Part, url: str) -> None:
    """Download from the hub's own address. The address it redirects to expires, and must not get the token."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    to, headers = cast(Any, part), build_hf_headers()
    http_get(url, to, resume_size=part.size, headers=headers, displayed_filename=file.name)
    if part.size > file.size:
        # Before version 1, huggingface_hub appends the whole file to its part if a server does not support ranges.
        part.seek(0)
        part.truncate()
        http_get(url, to, headers=headers, displayed_filename=file.name)


def _xet_session() -> Any:
    """Open Xet; None if hf_xet is not installed, is switched off, or is too old to begin in the middle of a file."""
    from huggingface_hub import constants

    if getattr(constants, "HF_HUB_DISABLE_XET", False):
        return None
    try:
        from hf_xet import XetSession
    except ImportError:
        return None
    return XetSession() if hasattr(XetSession, "new_download_stream_group") else None


def _xet_data(url: str) -> Any:
    """Return Xet's data of the file; None if Xet does not have it, or the hub refuses, which HTTP then reports."""
    from huggingface_hub import get_hf_file_metadata

    with contextlib.suppress(*expected_errors()):
        return get_hf_file_metadata(url).xet_file_data
    return None


def _wanted(name: str) -> bool:
    """Tell if a file is downloaded. Only the top folder counts: deeper ones hold other formats or evaluations."""
    return "/" not in name and "\\" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in WANTED)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(3)


def _say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()
