"""The process that downloads, against a hub on loopback."""

import hashlib
import json
import os
import shutil
import subprocess

import hub_server
import pytest
import torch
from hub_server import SHA
from safetensors.torch import save_file

from qwenvl.models.catalog import DEMO, PACK, find
from qwenvl.models.download import DownloadError, fetch, why_incomplete
from qwenvl.models.part import Part, RemoteFile
from qwenvl.models.transfer import UNFINISHED

WEIGHTS = "model.safetensors"
TOKEN = "hf_veryVerySecret123"


class Looker:
    """Keeps what it is told."""

    def __init__(self):
        self.reports = []

    def check(self):
        pass

    def report(self, done, total, text, state="downloading"):
        self.reports.append((done, total, text))
        assert state == ("checking" if text.startswith("Checking") else "downloading")


@pytest.fixture
def source(tmp_path):
    """What the hub serves: the demo model, and things that no model needs."""
    folder = shutil.copytree(find(DEMO).folder, tmp_path / "served")
    for name in ("pytorch_model.bin", "modeling_qwen.py", "README.md"):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch, source):
    yield from hub_server.start(tmp_path, monkeypatch, source)


@pytest.fixture
def get(hub, tmp_path):
    """Downloads; returns the folder and who looked on."""

    def run():
        looker = Looker()
        fetch("owner/name", tmp_path / "owner--name", looker)
        return tmp_path / "owner--name", looker

    return run


def test_a_model_arrives_whole_and_nothing_else_does(get, hub, source):
    folder, looker = get()
    assert why_incomplete(folder) is None
    wanted = {path.name for path in find(DEMO).folder.iterdir()}
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in wanted)
    total = sum((source / name).stat().st_size for name in wanted)
    assert looker.reports[-1][:2] == (total, total)
    done = [report[0] for report in looker.reports]
    assert done == sorted(done)
    assert "MB" in looker.reports[-1][2]


def test_of_a_sharded_model_only_the_shards_of_the_index_are_fetched(get, hub, source):
    (source / WEIGHTS).unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*shards, "consolidated.safetensors"):
        save_file({name: torch.zeros(8)}, source / name)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: name for name in shards}}))
    hub.files = {path.name: path.read_bytes() for path in source.iterdir()}
    hub.large = {name for name in hub.files if name.endswith(".safetensors")}
    folder, _ = get()
    assert why_incomplete(folder) is None
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards


def test_cut_connections_are_taken_up_where_they_broke(get, hub, source):
    hub.fail(cut_after={WEIGHTS: [1_000_000, 600_000]})
    folder, _ = get()
    assert (folder / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    starts = [int(range_.removeprefix("bytes=").rstrip("-") or 0) for range_ in hub.asked_for(WEIGHTS)]
    assert len(starts) == 3
    assert 0 == starts[0] < starts[1] < starts[2]


def test_a_server_that_knows_no_ranges_begins_anew(get, hub, source):
    hub.fail(cut_after={WEIGHTS: [1_000_000]}, ignores_range=True)
    folder, looker = get()
    assert (folder / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert looker.reports[-1][0] == looker.reports[-1][1]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (WEIGHTS, b"short", "it has 5 bytes instead of"),
        (WEIGHTS, None, "its hash is"),
        ("tokenizer.json", None, "its hash is"),
    ],
)
def test_a_wrong_size_or_hash_is_an_error_and_what_is_damaged_goes(get, hub, source, tmp_path, name, content, reason):
    right = (source / name).read_bytes()
    hub.fail(content={name: content or right[:-1] + bytes([right[-1] ^ 1])})
    with pytest.raises(DownloadError, match=rf"{name} of owner/name arrived damaged: {reason}.*{hub.url}"):
        get()
    folder = tmp_path / "owner--name"
    assert why_incomplete(folder) == "its download has not finished"
    assert list(folder.glob(f"{name}*")) == []
    hub.fail()
    assert why_incomplete(get()[0]) is None


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"api_error": (404, "RepoNotFound")}, "There is no owner/name at .*or it is private"),
        ({"api_error": (401, "")}, r"refuses access to owner/name \(HTTP 401\).*hf auth login"),
        ({"api_error": (401, "GatedRepo")}, "owner/name is gated: accept its terms at http.*/owner/name, then"),
        ({"file_error": (403, "GatedRepo")}, "owner/name is gated"),
        ({"file_error": (403, "")}, r"refuses access to owner/name \(HTTP 403\)"),
        ({"api_error": (503, "")}, "answered HTTP 503 for owner/name"),
        ({"no_sizes": True}, "does not say how large"),
    ],
)
def test_every_refusal_has_its_own_sentence(get, hub, faults, says):
    hub.fail(**faults)
    with pytest.raises(DownloadError, match=says) as caught:
        get()
    assert len(str(caught.value).splitlines()) == 1


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(get, hub, tmp_path):
    del hub.files[WEIGHTS]
    with pytest.raises(DownloadError, match=r"owner/name holds no \.safetensors weights"):
        get()
    assert not (tmp_path / "owner--name").exists()


def test_no_network_says_so_and_leaves_no_folder(get, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        DownloadError, match=r"could not be downloaded from http://127\.0\.0\.1:9.*Check the connection"
    ):
        get()
    assert not (tmp_path / "owner--name").exists()


def test_a_renamed_repository_is_fetched_and_its_new_name_told(get, hub, caplog):
    hub.fail(renamed_to="new-owner/new-name")
    assert why_incomplete(get()[0]) is None
    assert "owner/name is now called new-owner/new-name" in caplog.text


def test_the_token_goes_to_the_hub_and_nowhere_else(get, hub, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail(needs_token=TOKEN)
    folder, looker = get()
    assert why_incomplete(folder) is None
    assert {token for path, _, token in hub.asked if SHA in path or "/api/models/" in path} == {f"Bearer {TOKEN}"}
    assert {token for _, _, token in hub.cdn_asked} == {""}
    assert TOKEN not in caplog.text + repr(looker.reports)


def test_the_token_of_a_login_is_used(get, hub, tmp_path):
    hub.fail(needs_token=TOKEN)
    (tmp_path / "hf_home").mkdir()
    (tmp_path / "hf_home" / "token").write_text(TOKEN)
    assert why_incomplete(get()[0]) is None


def test_a_refused_token_is_not_repeated(get, hub, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail(needs_token="hf_another")
    with pytest.raises(DownloadError) as caught:
        get()
    assert TOKEN not in str(caught.value) + caplog.text


def test_files_that_lie_there_already_are_read_and_kept_if_they_are_right(get, hub, source, tmp_path):
    folder = tmp_path / "owner--name"
    folder.mkdir()
    shutil.copy(source / WEIGHTS, folder)
    (folder / "config.json").write_text("{}")
    get()
    assert hub.asked_for(WEIGHTS) == []
    assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_how_much_of_what_lies_there_is_read_is_told_before_anything_comes(get, source, tmp_path):
    """Of a large model that takes minutes."""
    folder = tmp_path / "owner--name"
    folder.mkdir()
    shutil.copy(source / WEIGHTS, folder)
    shutil.copy(source / "chat_template.jinja", folder)
    (folder / "config.json").write_text("{}")  # of another size: not read
    _, looker = get()
    checks = [report for report in looker.reports if report[2].startswith("Checking")]
    there = (source / WEIGHTS).stat().st_size + (source / "chat_template.jinja").stat().st_size
    assert looker.reports[: len(checks)] == checks and len(checks) >= 3
    assert [done for done, _, _ in checks] == sorted({done for done, _, _ in checks})
    assert checks[-1][:2] == (there, there)
    assert checks[-1][2] == "Checking the files of name that are there: 2.8 of 2.8 MB"
    _, again = get()
    assert again.reports == []  # whole


def test_what_an_earlier_try_left_counts_once(get, hub, source, tmp_path):
    content, folder = (source / WEIGHTS).read_bytes(), tmp_path / "owner--name"
    folder.mkdir()
    file = RemoteFile(WEIGHTS, len(content), sha256=hashlib.sha256(content).hexdigest())
    left = Part(file, folder, lambda _: None)
    left.write(content[:1_500_000])
    left.close()
    _, looker = get()
    assert hub.asked_for(WEIGHTS) == ["bytes=1500000-"]
    done, total, _ = looker.reports[-1]
    assert done == total and all(done <= total for done, _, _ in looker.reports)


def test_a_part_of_another_revision_is_not_used(get, hub, source, tmp_path):
    folder = tmp_path / "owner--name"
    folder.mkdir()
    (folder / f"{WEIGHTS}.{'0' * 12}.part").write_bytes(b"of another revision")
    get()
    assert hub.asked_for(WEIGHTS) == [""]
    assert list(folder.glob("*.part")) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB at the place of the model's folder."""
    folder = tmp_path / "owner--name"
    folder.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("NOT TESTED: a full disk. It needs Linux and root, to mount a small one")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("NOT TESTED: a full disk. Mounting a small one is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_noticed_before(get, hub, small_disk):
    (small_disk / "other").write_bytes(bytes(2_000_000))
    with pytest.raises(DownloadError, match=r"owner/name needs 2\.9 MB more on the disk of .*, and 2\.\d MB are free"):
        get()
    assert hub.asked_for(WEIGHTS) == []


def test_a_disk_that_fills_up_is_told_and_what_came_is_kept(hub, small_disk):
    hub.fail(drip={WEIGHTS: 0.2})

    class Filler(Looker):
        def report(self, done, total, text, state="downloading"):
            super().report(done, total, text)
            with (small_disk / "other").open("ab", buffering=0) as other:
                other.write(bytes(1_200_000))

    with pytest.raises(DownloadError, match=r"The disk of .*owner--name is full.*is kept"):
        fetch("owner/name", small_disk, Filler())
    (part,) = small_disk.glob(f"{WEIGHTS}*.part")
    assert hub.files[WEIGHTS].startswith(part.read_bytes())
    (small_disk / "other").unlink()
    hub.fail()
    fetch("owner/name", small_disk, Looker())
    assert why_incomplete(small_disk) is None


@pytest.fixture
def xet(hub, source, tmp_path):
    """The hub has the weights in Xet too, as a store on disk."""
    hf_xet = pytest.importorskip("hf_xet")
    if not hasattr(hf_xet, "XetSession"):
        pytest.skip("this hf_xet cannot begin in the middle of a file, so it is not used")
    hub.xet_store = f"local://{tmp_path / 'store'}"
    (tmp_path / "store").mkdir()
    with hf_xet.XetSession().new_upload_commit(endpoint=hub.xet_store) as commit:
        upload = commit.start_upload_file(str(source / WEIGHTS))
    hub.xet_hashes[WEIGHTS] = upload.result().xet_info.hash
    return hub


def test_what_lies_in_xet_comes_by_xet(get, xet, source, caplog):
    folder, _ = get()
    assert (folder / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert xet.asked_for(WEIGHTS) == []
    assert "Xet" not in caplog.text


def test_xet_goes_on_in_the_middle_of_a_file(get, xet, source, tmp_path):
    whole = (source / WEIGHTS).read_bytes()
    folder = tmp_path / "owner--name"
    folder.mkdir()
    sha256 = xet._metadata(WEIGHTS)["lfs"]["sha256"]
    (folder / f"{WEIGHTS}.{sha256[:12]}.part").write_bytes(whole[:2_000_000])
    _, looker = get()
    assert (folder / WEIGHTS).read_bytes() == whole
    assert xet.asked_for(WEIGHTS) == []
    assert looker.reports[-1][0] == looker.reports[-1][1], "what was there counts once"


@pytest.mark.parametrize("broken", ["store", "file"])
def test_where_xet_fails_http_goes_on(get, xet, source, caplog, broken):
    if broken == "store":
        xet.xet_store = "http://127.0.0.1:9"
    else:
        xet.xet_hashes[WEIGHTS] = "f" * 64
    folder, _ = get()
    assert (folder / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert xet.asked_for(WEIGHTS) == [""]
    assert f"{WEIGHTS}: Xet failed" in caplog.text


def test_xet_can_be_switched_off(get, xet, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    get()
    assert xet.asked_for(WEIGHTS) == [""]


def test_the_marker_is_there_from_the_first_file_to_the_last(hub, tmp_path):
    folder, seen = tmp_path / "owner--name", []

    class Watcher(Looker):
        def report(self, *_):
            seen.append((folder / UNFINISHED).exists() or why_incomplete(folder) is None)

    fetch("owner/name", folder, Watcher())
    assert seen
    assert all(seen)
    assert not (folder / UNFINISHED).exists()
    assert PACK not in folder.parents
