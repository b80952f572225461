"""Disks that are full or read-only, and clocks that jump: what is asked for is made, or it is said why not."""

import ast
import json
import os
import tempfile
import time

import hub_server
import pytest
from disks import PAGE, fill, read_only, small_disk
from picture_folder import ASK, CAPTIONS, SCENES
from pictures import ROOT, draw, image
from tiny import DEMO_FOLDER

from qwenvl.__main__ import main
from qwenvl.loading.cache import ModelCache
from qwenvl.media import folder
from qwenvl.models import catalog
from qwenvl.models.catalog import DEMO
from qwenvl.models.download import DownloadError, fetch, why_incomplete
from qwenvl.pipeline import run
from qwenvl.request import LoadSpec, Request, Sampling


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        yield disk


def pictures(where, count=8):
    for number in range(count):
        draw(*list(SCENES.values())[number % 4]).save(where / f"{number}.png")


def captions(where):
    return {file.stem: file.read_text() for file in where.glob("*.txt")}


def expected(count=8):
    return {str(number): list(CAPTIONS.values())[number % 4] for number in range(count)}


def caption(where, *flags):
    return main(["caption", str(where), *ASK, "--batch-size", "2", *flags])


def test_a_disk_that_fills_up_ends_a_folder_with_a_reason_and_the_next_run_goes_on(disk, capsys):
    pictures(disk)
    filler = fill(disk, but=3 * PAGE)
    assert caption(disk) == 2
    out, err = capsys.readouterr()
    assert "error: " in err
    assert "cannot be written (No space left on device). Make room and run it again" in err
    written = captions(disk)
    assert 1 <= len(written) < 8
    assert written.items() <= expected().items()
    assert f"{len(written)} captioned" in out
    assert [file.name for file in disk.iterdir() if file.name.startswith(".")] == []

    filler.unlink()
    assert caption(disk) == 0
    assert captions(disk) == expected()


def test_a_read_only_folder_is_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    pictures(tmp_path, 2)
    with read_only(tmp_path):
        with monkeypatch.context() as patched:
            patched.setattr("qwenvl.pipeline.caption", None)
            assert caption(tmp_path) == 2
        assert "cannot be written (Permission denied). Allow writing there" in capsys.readouterr().err
    assert caption(tmp_path) == 0


def test_a_read_only_folder_in_which_all_is_done_is_no_error(tmp_path):
    pictures(tmp_path, 2)
    assert caption(tmp_path) == 0
    (tmp_path / ".qwenvl-0.tmp").touch()
    os.utime(tmp_path / ".qwenvl-0.tmp", (1000, 1000))
    with read_only(tmp_path):
        assert caption(tmp_path) == 0
    assert caption(tmp_path) == 0
    assert not (tmp_path / ".qwenvl-0.tmp").exists()


def test_a_caption_that_cannot_be_written_says_which_and_why(tmp_path):
    with read_only(tmp_path), pytest.raises(folder.FolderError, match=r"a\.txt' cannot be written \(Read-only"):
        folder.write_whole(tmp_path / "a.txt", "x")
    with pytest.raises(folder.FolderError, match=r"gone/a\.txt' cannot be written \(No such file"):
        folder.write_whole(tmp_path / "gone" / "a.txt", "x")


class Watch:
    """Does something once when so many bytes have come."""

    def __init__(self, at=0, then=lambda: None):
        self.at, self.then, self.texts, self.cancelled = at, then, [], False

    def check(self): ...

    def report(self, done, total, text, state="downloading"):
        self.texts.append(text)
        if self.at and done > self.at:
            self.at = 0
            self.then()

    def stage(self, state, **facts): ...

    def update(self, new_tokens, text, thinking=""):
        self.texts.append(text)
        if self.at and new_tokens == self.at:
            raise KeyboardInterrupt

    def end(self, text): ...


@pytest.fixture
def hub(tmp_path, monkeypatch):
    yield from hub_server.start(tmp_path, monkeypatch, DEMO_FOLDER)


def test_a_disk_that_fills_up_ends_a_download_and_the_next_goes_on_from_there(hub, disk):
    model, filled = disk / "owner--name", []
    hub.fail(drip={"model.safetensors": 0.1})
    with pytest.raises(DownloadError, match=r"disk of .* is full\. Make room and try again: what has come so far is"):
        fetch("owner/name", model, Watch(600_000, lambda: filled.append(fill(disk))))
    assert why_incomplete(model)
    filled[0].unlink()
    hub.fail()
    fetch("owner/name", model, Watch())
    assert {file.name: file.read_bytes() for file in model.iterdir()} == hub.files
    assert int(hub.asked_for("model.safetensors")[-1].removeprefix("bytes=").rstrip("-")) > 1 << 18


def test_what_does_not_fit_is_said_before_it_is_fetched(hub, disk):
    filler = fill(disk, but=1 << 20)
    with pytest.raises(DownloadError, match=r"needs \d\.\d MB more on the disk of .*, and 1\.0 MB are free"):
        fetch("owner/name", disk / "owner--name", Watch())
    assert hub.asked_for("model.safetensors") == []
    filler.unlink()
    fetch("owner/name", disk / "owner--name", Watch())
    assert why_incomplete(disk / "owner--name") is None


def test_a_download_needs_no_room_for_temporary_files(hub, tmp_path, monkeypatch):
    """Where the only disk is full, Python finds no folder for them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    hub.fail(api_error=(404, "RepoNotFound"))
    with pytest.raises(DownloadError, match="There is no owner/name"):
        fetch("owner/name", tmp_path / "owner--name", Watch())


def test_a_read_only_models_folder_is_named(hub, tmp_path):
    (tmp_path / "LLM").mkdir()
    with read_only(tmp_path / "LLM"), pytest.raises(DownloadError, match=r"cannot be written to \(Read-only.*LLM in"):
        fetch("owner/name", tmp_path / "LLM" / "owner--name", Watch())


def test_a_model_on_a_read_only_disk_answers(disk, tmp_path, monkeypatch, capsys):
    for file in DEMO_FOLDER.iterdir():
        (disk / file.name).write_bytes(file.read_bytes())
    listed = tmp_path / "custom_models.json"
    listed.write_text(json.dumps({"hf_models": {"there": {"path": str(disk)}}}))
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", listed)
    draw("circle", "red", "blue").save(tmp_path / "a.png")
    with read_only(disk):
        assert main(["--model", "there", "--image", str(tmp_path / "a.png"), ASK[1], "--no-do-sample"]) == 0
    assert capsys.readouterr().out == "a red circle on a blue background\n"


@pytest.fixture
def jumping_clock(monkeypatch):
    """The wall clock goes ten years forward and back again, at every look."""
    real, looks = time.time, []

    def now():
        looks.append(1)
        return real() + (3e8 if len(looks) % 2 else -3e8)

    monkeypatch.setattr(time, "time", now)
    monkeypatch.setattr("tqdm.std.time", now)
    return looks


def question(**changes):
    pictures = {"image1": image(draw("circle", "red", "blue"))}
    return Request(
        LoadSpec(DEMO), ASK[1], images=pictures, sampling=Sampling(do_sample=False, max_new_tokens=40), **changes
    )


def test_a_clock_that_jumps_changes_no_answer_no_cancel_and_no_figure(jumping_clock):
    models, watch = ModelCache(), Watch()
    result = run(question(diagnostics="full"), models, watch)
    assert result.text == "a red circle on a blue background" == watch.texts[-1]
    assert len(watch.texts) > 5
    stats = result.stats
    measured = (
        stats.loaded.load_s,
        stats.prompt.prefill_s,
        stats.prompt.first_token_s,
        stats.total_s,
        stats.decode.decode_tokens_per_s,
    )
    assert min(measured) > 0
    assert stats.loaded.load_s + stats.prompt.prefill_s < stats.total_s < 600
    with pytest.raises(KeyboardInterrupt):
        run(question(), models, Watch(at=3))
    assert run(question(), models, Watch()).text == result.text
    assert len(models.held) == 1
    models.clear()


def test_a_clock_that_jumps_disturbs_no_folder_and_no_download(jumping_clock, hub, tmp_path):
    where = tmp_path / "set"
    where.mkdir()
    pictures(where, 6)
    for number in range(2):
        folder.write_whole(where / f"{number}.txt", "mine")
    assert caption(where) == 0
    assert captions(where) == {**expected(6), "0": "mine", "1": "mine"}
    hub.fail(drip={"model.safetensors": 0.05})
    watch = Watch()
    fetch("owner/name", tmp_path / "owner--name", watch)
    assert why_incomplete(tmp_path / "owner--name") is None
    assert not any("-" in text.replace("owner--name", "") for text in watch.texts), "no negative speed or time left"
    assert jumping_clock


def test_nothing_is_measured_by_the_wall_clock():
    """It can be set while something runs. A file's age is told by it, since files have no other; and the sidebar says
    since when a model is loaded, which is a time of day."""
    for file in [*(ROOT / "qwenvl").glob("*.py"), ROOT / "nodes.py"]:
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        wall = {call for call in calls if call in ("time.time", "time.time_ns") or call.endswith((".now", ".utcnow"))}
        assert wall <= ({"time.time"} if file.stem in ("folder", "cache") else set()), file.name
