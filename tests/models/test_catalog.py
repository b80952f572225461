import json
import shutil
from pathlib import Path

import pytest
import tiny

from qwenvl.models import builtin, catalog
from qwenvl.models.catalog import DEMO, Model, UnknownModelError
from qwenvl.models.discovery import hub_cache
from qwenvl.models.transfer import UNFINISHED

ENGINE = {"base_url": "http://127.0.0.1:8000/v1", "model": "m"}
MINE = Model("Mine", "someone/Mine-2B")


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Writes custom_models.json: an object, or text as it stands."""
    path = tmp_path / "custom_models.json"
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", path)
    return lambda content: path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "LLM"


def whole_model(folder):
    shutil.copytree(catalog.find(DEMO).folder, folder)
    return folder


def test_what_is_here_comes_first_and_the_demo_model_is_the_last_of_that(root, custom):
    custom({"models": {"Hub": {"repo_id": "a/Hub"}, "Own": {"path": str(root / "elsewhere" / "Own")}}})
    assert next(iter(catalog.vision_models([root]))) == next(iter(catalog.text_models([root]))) == DEMO
    whole_model(root / "Found")
    whole_model(root / "elsewhere" / "Own")
    for name in ("Qwen3-VL-8B-Instruct", "Qwen--Qwen3-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"):
        whole_model(root / name)
    whole_model(hub_cache() / "models--Qwen--Qwen3.5-2B" / "snapshots" / ("1" * 40))
    found = list(catalog.vision_models([root]))
    here = ["Qwen3-VL-2B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3.5-2B", "Qwen2-VL-2B-Instruct", "Own"]
    assert found[:7] == [*here, "Found", DEMO]
    assert found[7] == "Qwen3-VL-4B-Instruct" and found[-1] == "Hub"
    assert len(set(found)) == len(found)
    assert all(catalog.locate(catalog.find(name, [root]), [root]) for name in found[:7])
    assert not any(catalog.locate(catalog.find(name, [root]), [root]) for name in found[7:])
    # The other list has the same values as before, in whatever order.
    assert {DEMO, "Own", "Hub", "Qwen3-4B"} <= set(catalog.text_models([root]))


def test_what_is_gone_or_only_begun_is_not_among_those_that_are_here(root):
    folder = whole_model(root / "Qwen3-VL-8B-Instruct")
    (folder / "config.json").rename(folder / "config.gone")
    assert next(iter(catalog.vision_models([root]))) == DEMO
    (folder / "config.gone").rename(folder / "config.json")
    assert next(iter(catalog.vision_models([root]))) == "Qwen3-VL-8B-Instruct"
    (folder / UNFINISHED).write_text("")
    assert next(iter(catalog.vision_models([root]))) == DEMO


def test_custom_models_of_every_known_key_come_after_ours(custom):
    keys = ("hf_models", "hf_vl_models", "hf_text_models", "models")
    custom({key: {f"From {key}": {"repo_id": f"someone/{key}", "default": False}} for key in keys})
    assert list(catalog.text_models())[-4:] == [f"From {key}" for key in keys]
    assert catalog.find("From models").repo_id == "someone/models"


def test_a_broken_custom_file_costs_the_custom_models_only_and_is_named(custom, caplog):
    custom('{"hf_models": {"A": {}, "B": {"repo_id": "one/two"}}}')
    assert DEMO in catalog.vision_models()
    assert "A" not in catalog.vision_models()
    assert "B" in catalog.vision_models()
    assert "custom_models.json" in caplog.text


def test_a_custom_folder_that_does_not_see_is_listed_by_the_text_node_only(custom, root):
    custom(
        {"models": {"Reads": {"path": str(tiny.save("qwen3", root / "VL"))}, "Sees": {"path": str(tiny.DEMO_FOLDER)}}}
    )
    assert {"Reads", "Sees"} & set(catalog.vision_models()) == {"Sees"}
    assert {"Reads", "Sees"} <= set(catalog.text_models())


def test_a_custom_model_may_take_the_name_of_one_of_ours(custom, root):
    folder = whole_model(root / "here")
    custom({"models": {"Qwen3-VL-4B-Instruct": {"path": str(folder)}}})
    assert catalog.locate(catalog.find("Qwen3-VL-4B-Instruct"), [root]) == folder


def test_models_on_disk_are_listed_where_they_belong_and_found(root):
    sees, reads = whole_model(root / "Sees"), tiny.save("qwen3", root / "Reads")
    vision, text = catalog.vision_models([root]), catalog.text_models([root])
    assert ("Sees" in vision, "Reads" in vision) == (True, False)
    assert ("Sees" in text, "Reads" in text) == (False, True)
    for name, folder in (("Sees", sees), ("Reads", reads)):
        assert catalog.locate(catalog.find(name, [root]), [root]) == folder


def test_a_folder_that_a_listed_model_stands_for_is_not_listed_again(root, custom):
    custom({"models": {"Mine": {"repo_id": "someone/Mine-2B"}, "There": {"path": str(root / "There")}}})
    for name in ("Qwen3-VL-4B-Instruct", "Qwen--Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-2B-Instruct", "Mine-2B", "There"):
        whole_model(root / name)
    whole_model(root / "Qwen-VL" / "Qwen2.5-VL-3B-Instruct")
    whole_model(hub_cache() / "models--Qwen--Qwen2-VL-2B-Instruct" / "snapshots" / ("1" * 40))
    ours = {model.name for model in builtin.vision()}
    assert set(catalog.vision_models([root])) == ours | {"Mine", "There", DEMO}


def test_the_first_of_two_folders_with_one_name_counts(root, tmp_path):
    first, second = whole_model(tmp_path / "a" / "X"), whole_model(tmp_path / "b" / "X")
    assert catalog.find("X", [tmp_path / "a", tmp_path / "b"]).folder == first
    assert catalog.find("X", [tmp_path / "b", tmp_path / "a"]).folder == second


def test_an_unknown_model_is_named_with_those_that_come_close(root):
    with pytest.raises(UnknownModelError, match=r"'Qwen3-VL-4B' is not in the list.*custom_models\.json.*-4B-Instruct"):
        catalog.find("Qwen3-VL-4B")
    with pytest.raises(UnknownModelError, match=str(root)):
        catalog.find("???", [root])


def test_a_model_is_found_where_older_packs_put_it_and_under_its_owner(root):
    assert catalog.locate(MINE, [root]) is None
    deeper = whole_model(root / "Qwen-VL" / "Mine-2B")
    assert catalog.locate(MINE, [root]) is None, "of a model that is not listed the last name may be anybody's"
    own = whole_model(root / "someone--Mine-2B")
    assert catalog.locate(MINE, [root]) == own
    assert deeper.exists()


@pytest.mark.parametrize(
    "place",
    ["Qwen3-VL-2B-Thinking", "Qwen--Qwen3-VL-2B-Thinking", "Qwen/Qwen3-VL-2B-Thinking", "VL/Qwen3-VL-2B-Thinking"],
)
def test_every_place_of_a_listed_model_is_known(root, place):
    model = catalog.find("Qwen3-VL-2B-Thinking")
    folder = whole_model(root / place)
    assert catalog.locate(model, [root]) == folder
    assert catalog.candidates(model, [root])[0] == root / "Qwen--Qwen3-VL-2B-Thinking"


def test_a_model_in_the_cache_of_hugging_face_is_not_fetched_again_nor_written_to(root):
    model = catalog.find("Qwen3-VL-2B-Thinking")
    cached = whole_model(hub_cache() / "models--Qwen--Qwen3-VL-2B-Thinking" / "snapshots" / ("1" * 40))
    assert catalog.locate(model, [root]) == cached
    (cached / "model.safetensors").unlink()
    assert catalog.locate(model, [root]) is None
    assert catalog.candidates(model, [root])[0] != cached


def test_every_root_is_searched(tmp_path, custom):
    custom({"models": {"Mine": {"repo_id": MINE.repo_id}}})
    second = whole_model(tmp_path / "second" / "Mine-2B")
    assert catalog.locate(MINE, [tmp_path / "first", tmp_path / "second"]) == second


def test_two_repositories_with_one_last_name_do_not_share_a_folder(root, custom):
    custom({"models": {"A": {"repo_id": "one/Same"}, "B": {"repo_id": "two/Same"}}})
    whole_model(root / "Same")
    assert catalog.locate(catalog.find("A"), [root]) is None
    assert catalog.candidates(catalog.find("A"), [root]) != catalog.candidates(catalog.find("B"), [root])
    whole_model(root / "two--Same")
    assert catalog.locate(catalog.find("B"), [root]) == root / "two--Same"
    assert catalog.locate(catalog.find("A"), [root]) is None


def test_a_folder_that_is_not_whole_is_not_the_model(root, custom):
    custom({"models": {"Mine": {"repo_id": MINE.repo_id}}})
    folder = whole_model(root / "Mine-2B")
    (folder / "config.json").unlink()
    assert catalog.locate(MINE, [root]) is None


def test_the_users_own_file_is_read_too_and_wins(custom, caplog):
    custom({"models": {"A": {"repo_id": "top/A"}, "B": {"repo_id": "top/B"}}, "engines": {"e": ENGINE, "f": ENGINE}})
    catalog.own_file().parent.mkdir(parents=True, exist_ok=True)
    theirs = {
        "models": {"B": {"repo_id": "own/B"}, "C": {"repo_id": "own/C"}},
        "engines": {"f": ENGINE | {"model": "own"}},
    }
    catalog.own_file().write_text(json.dumps(theirs))
    found = catalog.all_models()
    assert [(name, found[name].repo_id) for name in "ABC"] == [("A", "top/A"), ("B", "own/B"), ("C", "own/C")]
    assert [name for name in catalog.vision_models() if name in "ABC"] == ["A", "B", "C"]
    assert [catalog.engine(f"{name} @ engine").model for name in "ef"] == ["m", "own"]
    assert caplog.text == ""


def test_without_comfyui_the_users_own_file_lies_in_the_home_folder(root):
    assert catalog.own_file() == Path.home() / ".config" / "qwenvl" / "custom_models.json"
