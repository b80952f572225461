import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import torch
from pictures import ROOT
from safetensors.torch import save_file

from qwenvl.files.headers import weight_headers
from qwenvl.files.locks import FileLock
from qwenvl.models.catalog import DEMO, find
from qwenvl.models.download import DownloadError, default_policy, fetch, why_forbidden, why_incomplete
from qwenvl.models.transfer import LOCK, UNFINISHED


@pytest.fixture
def folder(tmp_path):
    """A whole model in one file."""
    return shutil.copytree(find(DEMO).folder, tmp_path / "model")


@pytest.fixture
def sharded(folder):
    """The same in two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.zeros(8)}, folder / name)
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_whole_model_is_whole(folder, sharded):
    assert why_incomplete(folder) is None
    assert {name: tensor["shape"] for name, tensor in weight_headers(sharded).items()} == {"w0": [8], "w1": [8]}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_noticed(folder, name):
    (folder / name).unlink()
    assert why_incomplete(folder)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert why_incomplete(sharded) == "model-00002-of-00002.safetensors is missing"


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_that_was_cut_is_noticed(folder, size):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:size])
    assert "model.safetensors" in why_incomplete(folder)


def test_a_download_that_was_cut_off_is_not_taken_for_whole(folder):
    (folder / UNFINISHED).touch()
    assert why_incomplete(folder) == "its download has not finished"


def test_pickled_weights_are_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    reason = why_incomplete(folder)
    assert reason.startswith("it holds no .safetensors weights, only pytorch_model.bin")
    assert "none is ever opened" in reason


INDEXED = (
    *("/etc/passwd", "../other/model.safetensors", "sub/model.safetensors", "..", ".", "", "./model.safetensors"),
    *("..\\model.safetensors", "C:\\model.safetensors", "C:model.safetensors", "//host/share/a", "\\\\host\\share\\a"),
    *("file:///etc/passwd", "a\0.safetensors", "\ud800", "NUL", "a.safetensors:stream", "model.safetensors/"),
)


@pytest.mark.parametrize("outside", INDEXED)
def test_an_index_that_points_out_of_the_folder_is_refused(sharded, outside):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": outside}}))
    assert "not a plain file name" in why_incomplete(sharded)


@pytest.mark.parametrize("broken", ["{", "{}", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_a_reason_not_a_crash(sharded, broken):
    (sharded / "model.safetensors.index.json").write_text(broken)
    assert "cannot be read" in why_incomplete(sharded)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose weights drip: a piece at once, and the next in an hour."""
    for hub in hub_server.start(tmp_path, monkeypatch, find(DEMO).folder):
        hub.fail(drip={"model.safetensors": 3600.0})
        yield hub


class Cancelled(BaseException):
    """As ComfyUI's: not an Exception."""


class Watch:
    """Cancels once so many bytes are there, asked from the thread that waits."""

    def __init__(self, cancel_at=float("inf")):
        self.cancel_at, self.done, self.texts = cancel_at, 0, []

    def check(self):
        if self.done >= self.cancel_at:
            raise Cancelled

    def report(self, done, total, text, state="downloading"):
        self.done = done
        self.texts.append(text)


def part_of_the_weights(folder):
    (part,) = folder.glob("model.safetensors.*.part")
    return part.read_bytes()


def test_cancel_needs_no_answer_of_the_server_and_keeps_what_came(hub, tmp_path):
    """It would take an hour if it waited for one."""
    folder = tmp_path / "owner--name"
    with pytest.raises(Cancelled):
        fetch("owner/name", folder, Watch(cancel_at=300_000))
    came = part_of_the_weights(folder)
    assert len(came) >= 1 << 18
    assert hub.files["model.safetensors"].startswith(came)
    assert why_incomplete(folder) == "its download has not finished"
    hub.fail()
    fetch("owner/name", folder, Watch())
    assert why_incomplete(folder) is None
    assert hub.asked_for("model.safetensors") == ["", f"bytes={len(came)}-"]


def test_cancel_before_anything_is_known_of_the_repository(hub, tmp_path):
    hub.fail(silent=True)
    with pytest.raises(Cancelled):
        fetch("owner/name", tmp_path / "owner--name", CancelLater())
    assert not (tmp_path / "owner--name").exists()


class CancelLater(Watch):
    def check(self):
        self.done += 1
        self.cancel_at = 5
        super().check()


KILLED = """
import sys
from pathlib import Path
from qwenvl.models.download import fetch

class Watch:
    def check(self): pass
    def report(self, done, total, text, state="downloading"): print(done, flush=True)

fetch("owner/name", Path(sys.argv[1]), Watch())
"""


def test_a_process_killed_in_the_middle_leaves_nothing_running_and_the_next_goes_on(hub, tmp_path):
    folder = tmp_path / "owner--name"
    command = [sys.executable, "-c", KILLED, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 300_000:
                break
        process.kill()
    came = part_of_the_weights(folder)
    assert hub.files["model.safetensors"].startswith(came)
    # Whoever still downloads holds the lock.
    lock = FileLock(folder / LOCK)
    lock.wait(lambda: None)
    lock.release()
    hub.fail()
    fetch("owner/name", folder, Watch())
    assert why_incomplete(folder) is None
    assert hub.asked_for("model.safetensors") == ["", f"bytes={len(came)}-"]


class Behind(Watch):
    """Waits behind another download of the folder, which ends once that is logged.

    Args:
        ends: called just before the other one's lock is released.
    """

    def __init__(self, folder, caplog, ends=lambda: None):
        super().__init__()
        folder.mkdir()
        self._lock, self._caplog, self._ends, self._waits = FileLock(folder / LOCK), caplog, ends, True
        assert self._lock.take()

    def check(self):
        if self._waits and "another process is downloading" in self._caplog.text:
            self._waits = False
            self._ends()
            self._lock.release()


def test_two_that_want_the_same_model_wait_for_each_other(hub, tmp_path, caplog):
    hub.fail()
    folder = tmp_path / "owner--name"
    fetch("owner/name", folder, Behind(folder, caplog))
    assert why_incomplete(folder) is None


def start_fetching(folder):
    command = [sys.executable, "-c", KILLED, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_many_processes_fetch_a_model_once_and_what_is_whole_stays_whole(hub, tmp_path):
    """Whoever reads it meanwhile sees it whole from the first moment at which it is."""
    hub.fail(drip={"model.safetensors": 0.1})
    folder = tmp_path / "owner--name"
    started = [start_fetching(folder) for _ in range(4)]
    seen = []
    while any(process.poll() is None for process in started):
        seen.append(why_incomplete(folder) is None)
    told = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * 4, told
    assert seen == sorted(seen), "it was whole, and then it was not"
    assert hub.asked_for("model.safetensors") == [""]
    assert {path.name for path in folder.iterdir()} == {path.name for path in find(DEMO).folder.iterdir()}


def test_what_came_while_one_waited_is_left_as_it_is(hub, tmp_path, caplog):
    """Even where the hub has another version by now."""
    folder = tmp_path / "owner--name"

    def other_ends():
        shutil.copytree(find(DEMO).folder, folder, dirs_exist_ok=True)
        (folder / "tokenizer_config.json").write_text("{}")

    fetch("owner/name", folder, Behind(folder, caplog, other_ends))
    assert (folder / "tokenizer_config.json").read_text() == "{}"
    assert hub.asked_for("model.safetensors") == []


def test_cancel_is_heard_while_another_process_downloads(hub, tmp_path, caplog):
    folder = tmp_path / "owner--name"
    with start_fetching(folder) as other:
        assert other.stdout.readline()

        class Later(Watch):
            def check(self):
                if "another process is downloading" in caplog.text:
                    raise Cancelled

        with pytest.raises(Cancelled):
            fetch("owner/name", folder, Later())
        assert other.poll() is None
        other.kill()


def test_the_lock_of_a_dead_process_is_taken_over(hub, tmp_path):
    """And a file of that name which nobody holds is no lock."""
    hub.fail()
    folder = tmp_path / "owner--name"
    folder.mkdir()
    (folder / LOCK).write_text("4711")
    fetch("owner/name", folder, Watch())
    assert why_incomplete(folder) is None
    assert not (folder / LOCK).exists()


def test_progress_is_told_with_amounts_and_speed(hub, tmp_path):
    hub.fail(drip={"model.safetensors": 0.15})
    watch = Watch()
    fetch("owner/name", tmp_path / "owner--name", watch)
    assert re.fullmatch(r"Downloading name: \d\.\d of 2\.9 MB, \d+\.\d MB/s, \d+ s left", watch.texts[-2])
    assert len(watch.texts) > 3


def test_a_downloader_that_breaks_says_why_and_what_else_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qwenvl.models.download._PACK", tmp_path)
    with pytest.raises(DownloadError, match=r"ended by itself .*qwenvl.*hf download owner/name --local-dir"):
        fetch("owner/name", tmp_path / "owner--name", Watch())


@pytest.mark.parametrize(
    ("policy", "variables", "reason"),
    [
        ("auto", {}, None),
        ("never", {}, "the download policy is never"),
        ("auto", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("never", {"HF_HUB_OFFLINE": "0"}, "the download policy is never"),
        ("auto", {"TRANSFORMERS_OFFLINE": "yes"}, "TRANSFORMERS_OFFLINE is set"),
    ],
)
def test_who_may_download(monkeypatch, policy, variables, reason):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert why_forbidden(policy) == reason


@pytest.mark.parametrize(
    ("value", "policy"), [(None, "auto"), ("auto", "auto"), (" Never ", "never"), ("nvr", "never")]
)
def test_an_administrator_sets_the_default_and_a_slip_forbids(monkeypatch, value, policy):
    monkeypatch.delenv("QWENVL_DOWNLOAD", raising=False)
    if value:
        monkeypatch.setenv("QWENVL_DOWNLOAD", value)
    assert default_policy() == policy


def safetensors(**tensor):
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **tensor}
    header = json.dumps({"w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 8


@pytest.mark.parametrize(
    "content",
    [
        *(safetensors(**odd) for odd in ({"data_offsets": []}, {"data_offsets": [0, "8"]}, {"shape": [10**30]})),
        *(safetensors(**odd) for odd in ({"shape": "x"}, {"shape": [-1]}, {"dtype": []}, {"shape": [2.0]})),
        *((2).to_bytes(8, "little") + value + b"12345678" for value in (b"[]", b"5 ", b"\xff\xff")),
        (5000).to_bytes(8, "little") + b"[" * 5000 + b"12345678",
    ],
)
def test_weights_with_a_header_of_anything_are_incomplete_with_a_reason(tmp_path, content):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(safetensors())
    assert why_incomplete(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "cannot be read" in why_incomplete(tmp_path)


def test_a_header_that_claims_a_terabyte_is_not_read(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 41)
    assert "is not a safetensors file" in why_incomplete(tmp_path)


def test_a_folder_with_a_name_that_no_disk_takes_is_incomplete():
    assert "cannot be read" in why_incomplete(Path("/" + "n" * 300))
