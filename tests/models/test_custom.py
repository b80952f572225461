import json
import os
import re

import pytest

from qwenvl.files.bounded_json import SETTINGS
from qwenvl.models.builtin import Model
from qwenvl.models.catalog import CUSTOM_MODELS
from qwenvl.models.custom import MODEL_KEYS, bring_over, custom_engines, custom_models
from qwenvl.models.engines import Engine


@pytest.fixture
def file(tmp_path):
    """Writes the file: an object, or text as it stands."""

    def write(content):
        path = tmp_path / "custom_models.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        # Two writes may fall into one tick of the clock.
        write.times += 1
        os.utime(path, ns=(write.times, write.times))
        return path

    write.times = 0
    return write


REFERENCE = {
    "repo_id": "someone/Mine-2B",
    "model_class": "Qwen2.5",
    "default": False,
    "quantized": False,
    "vram_requirement": {"4bit": 3, "8bit": 5.5, "full": 9},
}


ENGINE = {"base_url": "http://127.0.0.1:8000/v1", "model": "m"}


def test_every_known_key_is_read_in_the_order_of_the_file(file, caplog):
    path = file({key: {f"From {key}": REFERENCE} for key in MODEL_KEYS})
    assert custom_models(path) == tuple(Model(f"From {key}", "someone/Mine-2B") for key in MODEL_KEYS)
    assert caplog.text == ""


def test_a_folder_of_this_machine_is_taken_with_and_without_a_repository(file, tmp_path, caplog):
    here = str(tmp_path / "My model")
    path = file({"models": {"A": {"path": here}, "B": {"path": here, "repo_id": "one/two"}}})
    assert custom_models(path) == (Model("A", "", tmp_path / "My model"), Model("B", "one/two", tmp_path / "My model"))
    assert caplog.text == ""


def test_engines_and_notes_are_no_mistake(file, caplog):
    assert custom_models(file({"$schema": "x", "_note": "y", "engines": {"mine": ENGINE}})) == ()
    assert caplog.text == ""


def test_the_shipped_file_is_right(caplog):
    assert custom_models(CUSTOM_MODELS) == ()
    assert caplog.text == ""


GOOD = '"Good": {"repo_id": "someone/Good"}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n "models": {\n', "line 3, column 1: Expecting property name"),
        ("[]", "it must hold an object"),
        (f'{{"hf_model": {{}}, "models": {{{GOOD}}}}}', "'hf_model': there is no such key.*hf_models"),
        (f'{{"hf_models": [], "models": {{{GOOD}}}}}', "'hf_models': it must map names to models"),
        (f'{{"models": {{"A": "one/two", {GOOD}}}}}', "'models' > 'A': it must be an object"),
        (f'{{"models": {{"A": {{}}, {GOOD}}}}}', "'models' > 'A': it needs repo_id or path"),
        (
            f'{{"models": {{"A": {{"default": true, "repo_id": "../../x"}}, {GOOD}}}}}',
            r"'models' > 'A' > 'repo_id': it must look like 'owner/name', got '\.\./\.\./x'; the model is left out",
        ),
        (f'{{"models": {{"A": {{"path": "models/x"}}, {GOOD}}}}}', "'A' > 'path': it must be an absolute folder"),
        (f'{{"models": {{"A": {{"path": "//host/share"}}, {GOOD}}}}}', "is a network or device path"),
        (f'{{"models": {{"A": {{"path": "/a\\u0000"}}, {GOOD}}}}}', "no path can hold"),
        (
            f'{{"models": {{"A": {{"repo_id": "one/two", "default": "yes"}}, {GOOD}}}}}',
            "'A' > 'default': it must be true or false, got 'yes'; the model is left out",
        ),
    ],
)
def test_a_mistake_is_named_with_file_and_keys_and_costs_what_it_concerns(file, caplog, text, says):
    path = file(text)
    names = [model.name for model in custom_models(path)]
    assert names == (["Good"] if "Good" in text else [])
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert re.search(says, record.getMessage())


def test_an_unknown_key_of_an_entry_is_named_and_the_model_is_kept(file, caplog):
    path = file('{"models": {"Ä": {"repo_id": "one/two", "repoid": "x"}}}')
    assert custom_models(path) == (Model("Ä", "one/two"),)
    assert "'models' > 'Ä' > 'repoid': there is no such key" in caplog.text


def test_models_and_engines_are_read_once_and_a_mistake_in_one_costs_the_other_nothing(file, caplog):
    path = file({"models": {"A": REFERENCE, "B": 5}, "engines": {"studio": ENGINE, "bad": {}}})
    for _ in range(2):
        assert [model.name for model in custom_models(path)] == ["A"]
        assert custom_engines(path) == (Engine("studio", **ENGINE),)
    assert ["'B'" in caplog.messages[0], "'bad'" in caplog.messages[1]] == [True, True]
    assert len(caplog.messages) == 2


def test_it_is_read_again_when_it_changes_and_complains_once(file, caplog):
    path = file("{")
    assert custom_models(path) == custom_models(path) == ()
    assert len(caplog.records) == 1
    assert [model.name for model in custom_models(file({"models": {"A": REFERENCE}}))] == ["A"]
    assert [model.name for model in custom_models(file({"models": {"B": REFERENCE}}))] == ["B"]


def test_no_file_is_no_mistake(tmp_path, caplog):
    assert custom_models(tmp_path / "none.json") == ()
    assert caplog.text == ""


def test_a_file_that_is_no_text_costs_the_custom_models_only(tmp_path, caplog):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe{}")
    assert custom_models(tmp_path / "c.json") == ()
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("content", ["[" * 5000, "1" * 5000, '{"models": ' * 3000])
def test_a_file_that_no_reader_follows_is_said_and_holds_no_models(tmp_path, caplog, content):
    file = tmp_path / "custom_models.json"
    file.write_text(content)
    assert custom_models(file) == ()
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(
    "entry", [{"path": "/a\0b"}, {"path": "/a\ud800"}, {"repo_id": f"a/{'b' * 200}"}, {"repo_id": "x" * 10**5}]
)
def test_a_place_that_no_disk_can_have_costs_its_model_only(tmp_path, caplog, entry):
    file = tmp_path / "custom_models.json"
    file.write_text(json.dumps({"models": {"bad": entry, "good": {"path": "/m"}}}))
    assert [model.name for model in custom_models(file)] == ["good"]
    assert max(map(len, caplog.messages)) < 600


def test_a_file_of_nothing_but_mistakes_is_complained_of_for_a_while(tmp_path, caplog):
    file = tmp_path / "custom_models.json"
    file.write_text(json.dumps({"models": {str(number): 5 for number in range(10_000)}}))
    assert custom_models(file) == ()
    assert len(caplog.records) == 21
    assert "more mistakes" in caplog.messages[-1]


@pytest.mark.parametrize(
    "content",
    [
        {"hf_models": {"Mine": REFERENCE}},
        {"engines": {"studio": ENGINE}},
        '{"models": {"half',
        "[]",
        '\ufeff{"models": 3}',
    ],
    ids=["models", "engines", "a mistake", "no object", "a mark of Windows"],
)
def test_what_a_user_wrote_is_copied_once_byte_by_byte_and_the_log_says_so(file, tmp_path, caplog, content):
    edited, place = file(content), tmp_path / "user" / "default" / "qwenvl" / "custom_models.json"
    bring_over(edited, place)
    assert place.read_bytes() == edited.read_bytes()
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    assert caplog.text.count("were copied to") == 1 and str(place) in caplog.text and str(edited) in caplog.text
    place.write_text('{"models": {}}')
    bring_over(edited, place)
    assert place.read_text() == '{"models": {}}', "the user has changed it since"
    assert caplog.text.count("were copied to") == 1


@pytest.mark.parametrize("content", [{"hf_models": {}}, {}, {"_note": "x", "hf_models": {}, "engines": {}}])
def test_a_file_that_nobody_wrote_into_is_not_copied(file, tmp_path, caplog, content):
    bring_over(file(content), tmp_path / "user" / "custom_models.json")
    bring_over(tmp_path / "gone.json", tmp_path / "user" / "custom_models.json")
    assert not (tmp_path / "user").exists()
    assert caplog.text == ""


def test_a_place_that_cannot_be_written_is_told_of_and_costs_nothing_else(file, tmp_path, caplog):
    (tmp_path / "user").write_text("a file where a folder should be")
    bring_over(file({"models": {"Mine": REFERENCE}}), tmp_path / "user" / "custom_models.json")
    assert "could not be copied" in caplog.text


def test_a_file_larger_than_any_list_of_models_is_told_of_and_not_copied(file, tmp_path, caplog):
    bring_over(file(f'{{"models": {{"Mine": "{"x" * SETTINGS.size}"}}}}'), tmp_path / "user" / "custom_models.json")
    bring_over(file(f'{{"models": [{"0," * SETTINGS.values}0]}}'), tmp_path / "user" / "custom_models.json")
    assert not (tmp_path / "user").exists()
    first, second = caplog.messages
    assert "could not be copied" in first and "larger than" in first
    assert "could not be copied" in second and "more than" in second


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes")
def test_a_pipe_in_its_place_is_told_of_and_not_waited_for(tmp_path, caplog):
    os.mkfifo(tmp_path / "custom_models.json")
    bring_over(tmp_path / "custom_models.json", tmp_path / "user" / "custom_models.json")
    assert "could not be copied" in caplog.text
