"""Who may read and write what: every attack through the nodes, in the double of ComfyUI."""

import os
from pathlib import Path

import attacks
import pytest
from attacks import ALIASES, CAPTION, FILMS, LISTED, NAMES, ON_WINDOWS, PATHS, PLAIN, SETS, let_in

from qwenvl.media.media import read_video
from qwenvl.models.catalog import DEMO
from qwenvl.paths import is_roundabout, why_not_local
from qwenvl.request import Frames

# What a node may answer an attack with; the pack's own are classes of their own in the double.
UNKNOWN = ("is not in the list", "does not exist", "Value not in list")
REFUSALS = {"ForbiddenPathError", "FolderError", "MediaError", "Rejected"}


@pytest.fixture
def at(tmp_path, comfy, monkeypatch):
    """ComfyUI's folders, reached from elsewhere."""
    with attacks.ground(tmp_path) as ground:
        monkeypatch.setattr(comfy, "base", ground.base)
        comfy.args.listen = "0.0.0.0"
        yield ground


@pytest.fixture
def doors(comfy, pack):
    """Each way for a value to become a path: input -> what is said of a value, None if nothing is."""
    nodes = pack.NODE_CLASS_MAPPINGS

    def door(node, name, **others):
        def ask(value):
            try:
                comfy.run(nodes[node], **others, **{name: value})
            except ValueError as error:
                assert type(error).__name__ in REFUSALS, f"{value!r:.200}: {error!r:.500}"
                return str(error)
            return None

        return ask

    declared = nodes["QwenVL"].INPUT_TYPES()["required"]
    asked = {name: options["default"] for name, (_, options) in declared.items()}
    question = asked | {"text": "Describe.", "model": DEMO, "seed": 1, "max_new_tokens": 1}
    text = {"text": ["x"], "names": [CAPTION.replace("txt", "png")], "existing": "overwrite"}
    return {
        "video_path": door("QwenVL", "video_path", **question),
        "load": door("QwenVLLoadFolder", "folder", pattern="*", sort="name", limit=0),
        "save": door("QwenVLSaveCaptions", "folder", **text),
        "names": door("QwenVLSaveCaptions", "names", text=["x"], folder=".", existing="overwrite"),
        "model": door("QwenVL", "model", **{k: v for k, v in question.items() if k != "model"}),
        "preset": door("QwenVL", "preset", **question),
    }


def test_there_are_enough_attacks():
    assert len(set(PATHS)) == len(PATHS) > 100


@pytest.mark.parametrize(("door", "name"), [("video_path", "video_path"), ("load", "folder"), ("save", "folder")])
def test_from_elsewhere_no_value_leads_out_of_comfyuis_folders(at, doors, door, name):
    assert let_in(at, name, PATHS, doors[door]) == []
    assert at.harm() == []


def test_names_that_mean_more_to_others_reach_nothing_else(at, doors, pack):
    inside = [(at.base / name).resolve() for name in ("input", "output", "temp", "user")]
    for value in map(at.value, (*PLAIN, *ON_WINDOWS, *ALIASES)):
        doors["load"](value)
        doors["save"](value)
        try:
            file = pack.nodes._video_file(value)
        except ValueError:
            continue
        assert any(Path(file).is_relative_to(folder) for folder in inside)
    assert at.harm() == []


def test_no_name_of_a_caption_leads_out_of_its_folder(at, doors):
    assert let_in(at, "names", NAMES, doors["names"], ["is not a file's name"]) == []
    assert at.harm() == []


@pytest.mark.parametrize("name", ["model", "preset"])
def test_what_is_in_no_list_is_looked_for_nowhere(at, doors, name):
    assert let_in(at, name.capitalize() if name == "model" else name, LISTED, doors[name], UNKNOWN) == []
    assert at.harm() == []


def test_a_caption_takes_the_place_of_a_link_and_does_not_follow_it(at, doors):
    (at.base / "output" / CAPTION).symlink_to(at.outside / "secret.mp4")
    assert doors["save"](".") is None
    assert (at.base / "output" / CAPTION).read_text() == "x"
    assert at.harm() == []


def test_a_preset_that_is_a_link_out_of_comfyuis_folders_is_not_there(at, doors, pack):
    own = at.base / "user" / "default" / "qwenvl" / "presets"
    own.mkdir(parents=True)
    (own / "mine.txt").write_text("Describe.")
    (own / "stolen.yaml").symlink_to(at.outside / "secret.yaml")
    os.mkfifo(own / "pipe.txt")
    assert {"mine"} == set(pack.nodes.presets.names()) & {"mine", "stolen", "pipe"}
    assert "'stolen' not in" in doors["preset"]("stolen")


@pytest.mark.parametrize("template", FILMS)
def test_films_in_comfyuis_folders_are_shown(at, pack, template):
    file = pack.nodes._video_file(at.value(template))
    assert len(read_video("v", file, Frames()).frames) == 4


def test_a_film_is_described_from_elsewhere(at, doors):
    assert doors["video_path"]("my film, the 2nd (copy).mp4") is None


@pytest.mark.parametrize("template", SETS)
def test_folders_in_comfyuis_folders_are_loaded_and_written(at, comfy, doors, pack, template):
    assert doors["load"](at.value(template)) is None
    assert doors["save"](at.value(template)) is None
    assert at.harm() == []


@pytest.mark.parametrize("value", ["strict", " Strict ", "yes", ""])
def test_where_the_setting_is_strict_it_is_so_at_this_machine_too(at, comfy, doors, monkeypatch, value):
    comfy.args.listen = "127.0.0.1"
    assert doors["load"](str(at.base / "input2")).startswith("folder: ")
    monkeypatch.setenv("QWENVL_PATHS", value)
    assert "QWENVL_PATHS" in doors["load"](str(at.base / "input2"))


@pytest.mark.parametrize("value", [*ON_WINDOWS])
def test_windows_devices_and_streams_are_no_files(value):
    assert why_not_local(value, windows=True)


@pytest.mark.parametrize("value", [*ALIASES])
def test_windows_other_names_of_a_file_are_known(value):
    assert is_roundabout(value, windows=True)
    assert not is_roundabout("my set.v2/ordinary name.tar.gz", windows=True)
