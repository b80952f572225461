import json
import shutil

import pytest

from qwenvl import catalog
from qwenvl.catalog import DEMO, Model, UnknownModelError

MINE = Model("Mine", "someone/Mine-2B")


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Writes custom_models.json: an object, or text as it stands."""
    path = tmp_path / "custom_models.json"
    monkeypatch.setattr(catalog, "CUSTOM_MODELS", path)
    return lambda content: path.write_text(content if isinstance(content, str) else json.dumps(content))


def whole_model(folder):
    shutil.copytree(catalog.find(DEMO).folder, folder)
    return folder


def test_the_demo_model_is_the_last_of_both_lists_and_is_there():
    assert list(catalog.vision_models())[-1] == list(catalog.text_models())[-1] == DEMO
    assert catalog.locate(catalog.find(DEMO), []) == catalog.PACK / "demo" / "model"


def test_custom_models_of_every_known_key_come_before_the_demo(custom):
    keys = ("hf_models", "hf_vl_models", "hf_text_models", "models")
    custom({key: {f"From {key}": {"repo_id": f"someone/{key}", "default": False}} for key in keys})
    assert list(catalog.text_models())[-5:] == [*(f"From {key}" for key in keys), DEMO]
    assert catalog.find("From models").repo_id == "someone/models"


@pytest.mark.parametrize(
    "broken",
    ["{", "[]", '{"hf_models": []}', '{"hf_models": {"A": {}}}', '{"hf_models": {"A": {"repo_id": "../../x"}}}'],
)
def test_a_broken_custom_file_costs_the_custom_models_only_and_is_named(custom, caplog, broken):
    custom(broken)
    assert DEMO in catalog.vision_models()
    assert "A" not in catalog.vision_models()
    assert "custom_models.json" in caplog.text


def test_an_unknown_model_is_named_with_those_that_exist():
    with pytest.raises(
        UnknownModelError, match=r"'Qwen9' is not in the list.*custom_models\.json.*Qwen3-VL-4B-Instruct"
    ):
        catalog.find("Qwen9")


def test_a_model_is_found_where_older_packs_put_it_and_under_its_owner(tmp_path):
    assert catalog.locate(MINE, [tmp_path]) is None
    old = whole_model(tmp_path / "Mine-2B")
    assert catalog.locate(MINE, [tmp_path]) == old
    own = whole_model(tmp_path / "someone--Mine-2B")
    assert catalog.locate(MINE, [tmp_path]) == own


def test_every_root_is_searched(tmp_path):
    second = whole_model(tmp_path / "second" / "Mine-2B")
    assert catalog.locate(MINE, [tmp_path / "first", tmp_path / "second"]) == second


def test_two_repositories_with_one_last_name_do_not_share_a_folder(tmp_path, custom):
    custom({"models": {"A": {"repo_id": "one/Same"}, "B": {"repo_id": "two/Same"}}})
    whole_model(tmp_path / "Same")
    assert catalog.locate(catalog.find("A"), [tmp_path]) is None
    assert catalog.candidates(catalog.find("A"), [tmp_path]) != catalog.candidates(catalog.find("B"), [tmp_path])


def test_a_folder_that_is_not_whole_is_not_the_model(tmp_path):
    folder = whole_model(tmp_path / "Mine-2B")
    (folder / "config.json").unlink()
    assert catalog.locate(MINE, [tmp_path]) is None
