import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from qwenvl.models.builtin import Model
from qwenvl.models.catalog import locate
from qwenvl.models.discovery import describe, discovered, hub_cache, in_hub_cache
from qwenvl.models.download import UNFINISHED

FIRST, SECOND = "1" * 40, "2" * 40


def demo(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
    return shutil.copytree(tiny.DEMO_FOLDER, folder)


def names(*roots):
    return {model.name for model, _ in discovered(roots)}


def snapshot(revision, repo_id="someone/Cached", main=None):
    repository = hub_cache() / f"models--{repo_id.replace('/', '--')}"
    folder = demo(repository / "snapshots" / revision)
    if main:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(main)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_is_named_as_it_is_called_with_its_owner_or_one_deeper(tmp_path):
    plain, deep = demo(tmp_path / "Mine"), demo(tmp_path / "Qwen-VL" / "Deep")
    demo(tmp_path / "someone--Theirs")
    size = (plain / "model.safetensors").stat().st_size
    found = {model.name: model for model, sees in discovered([tmp_path]) if sees}
    assert set(found) == {"Mine", "someone/Theirs", "Qwen-VL/Deep"}
    assert (found["Mine"].folder, found["Qwen-VL/Deep"].folder) == (plain, deep)
    assert found["someone/Theirs"] == Model("someone/Theirs", "someone/Theirs", None, found["Mine"].size)
    assert found["Mine"].size.disk == size


def test_text_models_and_those_that_see_are_told_apart_by_their_config(tmp_path):
    demo(tmp_path / "Looks-VL")
    tiny.save("qwen3", tmp_path / "Named-VL")
    assert {model.name: sees for model, sees in discovered([tmp_path])} == {"Looks-VL": True, "Named-VL": False}


def test_a_new_folder_and_one_that_changed_are_seen_at_once(tmp_path):
    assert names(tmp_path) == set()
    folder = demo(tmp_path / "New")
    assert names(tmp_path) == {"New"}
    (folder / "model.safetensors").unlink()
    assert names(tmp_path) == set()
    shutil.copy(tiny.DEMO_FOLDER / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_something_is_no_model(tmp_path, missing):
    (demo(tmp_path / "Half") / missing).unlink()
    assert names(tmp_path) == set()


def test_a_folder_of_pickles_is_no_model_and_the_log_says_why_once(tmp_path, caplog):
    folder = demo(tmp_path / "LLM" / "mine")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with caplog.at_level("INFO"):
        assert names(tmp_path / "LLM") == names(tmp_path / "LLM") == set()
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"not in the list of models: {folder}: it holds no .safetensors weights, only pytorch_model.bin" in said


def test_a_download_under_way_and_hidden_folders_are_none(tmp_path):
    (demo(tmp_path / "Coming") / UNFINISHED).touch()
    demo(tmp_path / ".cache")
    assert names(tmp_path) == set()


def test_files_in_a_root_and_roots_that_are_not_there_do_no_harm(tmp_path):
    (tmp_path / "clip_l.safetensors").touch()
    assert names(tmp_path, tmp_path / "nowhere") == set()


def test_a_broken_config_is_told_once_and_hides_no_other(tmp_path, caplog):
    caplog.set_level("INFO")
    demo(tmp_path / "Good")
    (demo(tmp_path / "Bad") / "config.json").write_text("{")
    assert names(tmp_path) == names(tmp_path) == {"Good"}
    assert len(caplog.records) == 1
    assert "Bad" in caplog.text


def test_the_cache_of_hugging_face_is_looked_into(tmp_path):
    older = snapshot(FIRST)
    assert {model.repo_id for model, _ in discovered([])} == {"someone/Cached"}
    assert in_hub_cache("someone/Cached") == [older]
    newer = snapshot(SECOND)
    os.utime(older, (1, 1))
    assert in_hub_cache("someone/Cached") == [newer, older]
    snapshot("3" * 40, main=FIRST)
    assert in_hub_cache("someone/Cached")[0] == older, "the one that main was"
    assert in_hub_cache("someone/Else") == []


def test_a_snapshot_without_weights_hides_none_that_has_them():
    """As when somebody fetched a tokenizer, or the weights of a newer revision did not come."""
    whole, newer = snapshot(FIRST), snapshot(SECOND, main=SECOND)
    os.utime(whole, (1, 1))
    (newer / "model.safetensors").unlink()
    assert {model.repo_id: sees for model, sees in discovered([])} == {"someone/Cached": True}
    assert in_hub_cache("someone/Cached") == [newer, whole]
    assert locate(Model("someone/Cached", "someone/Cached"), []) == whole
    (newer / "model.safetensors").symlink_to("../../blobs/gone")
    assert locate(Model("someone/Cached", "someone/Cached"), []) == whole, "a link that leads nowhere"


def test_a_main_branch_that_names_no_snapshot_leaves_the_others(tmp_path):
    whole = snapshot(FIRST, main="3" * 40)
    linked = tmp_path / "elsewhere"
    whole.rename(linked)
    whole.symlink_to(linked, target_is_directory=True)
    assert locate(Model("someone/Cached", "someone/Cached"), []) == whole


def test_the_size_of_a_folder_is_that_of_the_weights_that_are_read(tmp_path):
    folder = demo(tmp_path / "Mine")
    size = (folder / "model.safetensors").stat().st_size
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert describe(folder).bytes_on_disk == size


def test_links_into_the_cache_s_blobs_count_and_broken_ones_do_not(tmp_path):
    folder = snapshot(FIRST)
    blob = tmp_path / "hub" / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    known = describe(folder)
    assert known.bytes_on_disk == blob.stat().st_size
    blob.unlink()
    os.utime(folder, (5, 5))
    assert describe(folder).bytes_on_disk == 0, "that it is not whole is seen when it is used"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"HF_HOME": "~/c"}, "~/c/hub"),
        ({"HF_HOME": "$WHERE/c", "WHERE": "/w"}, "/w/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_library_has_it(monkeypatch, variables, place):
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(place).expanduser()


def test_the_library_says_the_same(tmp_path):
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    for variables in ({"HF_HOME": "$WHERE/c", "WHERE": "/w"}, {"XDG_CACHE_HOME": "/d"}, {"HF_HUB_CACHE": "~/e"}):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG"))}
        done = subprocess.run(
            [sys.executable, "-c", code], env=clean | variables, capture_output=True, text=True, check=True
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("HF_HUB_CACHE")
            for name, value in variables.items():
                patch.setenv(name, value)
            assert done.stdout.strip() == str(hub_cache())
