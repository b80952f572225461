import os

import numpy as np
import pytest
import torch
from comfy_double import InterruptProcessingException
from pictures import draw

SCENES = {
    "2.png": ("circle", "red", "blue", (160, 120)),
    "10.jpg": ("square", "yellow", "green", (128, 128)),
    "a.webp": ("triangle", "green", "white", (200, 100)),
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, scene in SCENES.items():
        draw(*scene).save(folder / name, quality=95)
    return folder


@pytest.fixture
def nodes(pack):
    return pack.NODE_CLASS_MAPPINGS


@pytest.fixture
def load(comfy, nodes):
    def run(folder, pattern="*", sort="name", limit=0, **more):
        values = {"folder": str(folder), "pattern": pattern, "sort": sort, "limit": limit, **more}
        images, names, (where,) = comfy.run(nodes["QwenVLLoadFolder"], **values)
        return images, names, where

    return run


@pytest.fixture
def save(comfy, nodes):
    def run(text, names, folder, existing="skip"):
        values = {"text": text, "names": names, "folder": str(folder), "existing": existing}
        return comfy.run(nodes["QwenVLSaveCaptions"], **values)

    return run


def test_pictures_come_as_a_list_with_their_names_and_sizes(load, folder):
    images, names, where = load(folder)
    assert names == ["2.png", "10.jpg", "a.webp"]
    assert [tuple(picture.shape) for picture in images] == [(1, 120, 160, 3), (1, 128, 128, 3), (1, 100, 200, 3)]
    assert {picture.dtype for picture in images} == {torch.float32}
    expected = np.asarray(draw(*SCENES["2.png"]))
    assert (np.round(images[0][0].numpy() * 255) == expected).all()
    assert where == str(folder)


def test_pattern_sort_and_limit_pick(load, folder):
    for number, name in enumerate(SCENES):
        os.utime(folder / name, (1000 - number, 1000 - number))
    assert load(folder, "*.jpg")[1] == ["10.jpg"]
    assert load(folder, sort="oldest first", limit=2)[1] == ["a.webp", "10.jpg"]


def test_a_picture_that_cannot_be_read_is_left_out_and_named(load, folder, comfy, caplog):
    (folder / "1.png").write_text("no picture")
    images, names, _ = load(folder)
    assert len(images) == len(names) == 3
    assert "1.png" not in names
    assert "1.png" in caplog.text
    assert comfy.texts[-1][0] == "3 pictures; unreadable: 1.png"


def test_pictures_that_have_a_caption_are_left_out_where_that_is_asked(load, save, folder, comfy):
    save(["red"], ["2.png"], folder)
    assert load(folder)[1] == ["2.png", "10.jpg", "a.webp"]
    images, names, _ = load(folder, skip_captioned=True)
    assert (len(images), names) == (2, ["10.jpg", "a.webp"])
    assert comfy.texts[-1][0] == "2 pictures; 1 left out, with a caption"
    # As many as were asked for, of those that wait.
    assert load(folder, skip_captioned=True, limit=1)[1] == ["10.jpg"]
    assert load(folder, "2.*", skip_captioned=False)[1] == ["2.png"]
    save(["yellow", "green"], names, folder)
    result = load(folder, skip_captioned=True)
    assert [[entry.message for entry in result[place]] for place in (0, 1)] == [[None], [None]]
    assert result[2] == str(folder)
    assert comfy.texts[-1][0] == "0 pictures; 3 left out, with a caption"
    (folder / "broken.png").write_text("no picture")
    assert load(folder, skip_captioned=True)[1][0].message is None
    assert comfy.texts[-1][0] == "0 pictures; 3 left out, with a caption; unreadable: broken.png"
    (folder / "2.txt").unlink()
    assert load(folder, skip_captioned=True)[1] == ["2.png"]


def test_two_pictures_of_one_name_have_captions_of_their_own(load, save, folder):
    draw("circle", "red", "blue").save(folder / "a.png")
    (folder / "a.txt").write_text("of whichever")
    assert load(folder, "a.*", skip_captioned=True)[1] == ["a.png", "a.webp"]
    # One at a time, as a limit has it, and although the pattern hides the other.
    for name in ("a.png", "a.webp"):
        assert load(folder, "a.*", skip_captioned=True, limit=1)[1] == [name]
        save([name], [name], folder)
    assert (folder / "a.png.txt").read_text() == "a.png"
    assert load(folder, "a.png", skip_captioned=True)[0][0].message is None


def test_without_any_picture_it_is_an_error(load, folder):
    with pytest.raises(ValueError, match="holds no picture"):
        load(folder, "*.gif")
    (folder / "x.gif").write_text("no picture")
    with pytest.raises(ValueError, match="holds no picture"):
        load(folder, "*.gif")
    with pytest.raises(ValueError, match="no folder"):
        load(folder / "gone")


def test_a_relative_folder_lies_in_comfyuis_input_folder(load, comfy):
    where = comfy.base / "input" / "my set"
    where.mkdir(parents=True, exist_ok=True)
    draw("circle", "red", "blue").save(where / "a.png")
    assert load("my set")[1:] == (["a.png"], str(where))


def test_more_than_fits_into_memory_is_refused_before_anything_is_read(load, folder, pack, monkeypatch):
    monkeypatch.setattr(pack.nodes.host, "free_ram", lambda: 200 * 100 * 12)
    assert load(folder, "a.webp")[1] == ["a.webp"]
    with pytest.raises(ValueError, match=r"3 pictures need .* python -m qwenvl caption"):
        load(folder)


def test_cancel_stops_between_two_pictures(load, folder, comfy):
    comfy.interrupt_at = 1
    with pytest.raises(InterruptProcessingException):
        load(folder)
    assert len(comfy.progress) == 1


def test_the_page_is_told_that_pictures_are_read_and_of_no_tokens(load, folder, comfy):
    comfy.running[0] = (0, "p", {}, {"client_id": "browser", "extra_pnginfo": {"workflow": {"id": "w"}}}, [])
    names = load(folder)[1]
    told = [data for event, data, _ in comfy.events if event == "qwenvl.progress"]
    assert [entry["state"] for entry in told] == ["starting", "reading", "done"]
    assert {entry["unit"] for entry in told} == {"", "pictures"}
    assert (told[1]["done"], told[1]["text"]) == (1, f"1 of {told[1]['total']} pictures")
    assert told[1]["total"] >= len(names)


def test_a_folder_that_changed_is_read_again(load, folder, nodes):
    def stamp(**changes):
        return nodes["QwenVLLoadFolder"].IS_CHANGED(
            **{"folder": str(folder), "pattern": "*", "sort": "name", "limit": 0, **changes}
        )

    first = stamp()
    assert stamp() == first
    assert load(folder)[0][0] is load(folder)[0][0]
    draw("circle", "red", "white").save(folder / "b.png")
    assert stamp() != first
    assert load(folder)[1] == ["2.png", "10.jpg", "a.webp", "b.png"]
    second = stamp()
    draw("square", "blue", "white").save(folder / "b.png")
    os.utime(folder / "b.png", (1, 1))
    assert stamp() != second
    assert stamp(folder=str(folder / "gone")) == stamp(folder=None) == ""


def test_from_elsewhere_only_comfyuis_folders_can_be_read_and_written(load, save, folder, comfy, nodes):
    inside = comfy.base / "input" / "open"
    inside.mkdir(parents=True, exist_ok=True)
    draw("circle", "red", "blue").save(inside / "a.png")
    if not (inside / "link.png").is_symlink():
        (inside / "link.png").symlink_to(folder / "2.png")
    assert load(inside)[1] == ["a.png", "link.png"]
    comfy.args.listen = "0.0.0.0"
    assert load(inside)[1] == ["a.png"]
    changed = nodes["QwenVLLoadFolder"].IS_CHANGED
    for where in (folder, folder / "gone"):
        with pytest.raises(ValueError, match="not in a folder that may be reached"):
            load(where)
        with pytest.raises(ValueError, match="not in a folder that may be reached"):
            save(["x"], ["2.png"], where)
        assert changed(folder=str(where), pattern="*", sort="name", limit=0) == ""
    assert sorted(file.name for file in folder.iterdir()) == ["10.jpg", "2.png", "a.webp"]
    save(["x"], ["a.png"], "captions")
    assert (comfy.base / "output" / "captions" / "a.txt").read_text() == "x"


def test_captions_lie_beside_their_pictures(save, folder):
    save(["one", "zwei ü", ""], list(SCENES), folder)
    assert {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.txt")} == {
        "2.txt": "one",
        "10.txt": "zwei ü",
        "a.txt": "",
    }


@pytest.mark.parametrize(("existing", "kept"), [("skip", "mine"), ("overwrite", "new")])
def test_captions_that_are_there_stay_or_are_replaced(save, folder, comfy, existing, kept):
    (folder / "2.txt").write_text("mine")
    save(["new", "ten", "aaa"], list(SCENES), folder, existing)
    assert [(folder / name).read_text() for name in ("2.txt", "10.txt", "a.txt")] == [kept, "ten", "aaa"]
    written = 2 if existing == "skip" else 3
    assert comfy.texts[-1][0] == f"{written} captions written to {folder}, {3 - written} were there and stayed"


def test_files_that_were_deleted_are_written_again(save, folder):
    for _ in range(2):
        save(["one"], ["2.png"], folder)
        (folder / "2.txt").unlink()


def test_a_new_folder_is_made_in_comfyuis_output_folder(save, comfy):
    save(["one"], ["a.png"], "new/captions")
    assert (comfy.base / "output" / "new" / "captions" / "a.txt").read_text() == "one"


def test_one_text_for_many_names_is_an_error_that_says_what_to_do(save, folder):
    with pytest.raises(ValueError, match=r"1 texts for 3 names.*one answer per image"):
        save(["all"], list(SCENES), folder)
    assert list(folder.glob("*.txt")) == []


@pytest.mark.parametrize("name", ["../a.png", "/tmp/a.png", "sub/a.png", "..", "", "a\0.png"])
def test_a_name_that_is_more_than_a_name_is_refused_before_anything_is_written(save, folder, name):
    with pytest.raises(ValueError, match="not a file's name"):
        save(["one", "two"], ["2.png", name], folder)
    assert list(folder.glob("*.txt")) == []
    assert not (folder.parent / "a.txt").exists()


def test_two_pictures_of_one_name_lose_no_caption(save, folder):
    save(["one", "two"], ["2.png", "2.jpg"], folder)
    assert [(folder / name).read_text() for name in ("2.png.txt", "2.jpg.txt")] == ["one", "two"]
    with pytest.raises(ValueError, match="two pictures have one name"):
        save(["one", "two"], ["2.png", "2.png"], folder)


def test_a_name_that_is_too_long_for_its_caption_costs_its_picture_only(save, folder, comfy, caplog):
    # Two of one name get captions of the whole name.
    long = ["p" * 251 + ".png", "p" * 251 + ".jpg"]
    for existing in ("skip", "overwrite"):
        save(["one", "x", "y", "ten"], ["2.png", *long, "10.jpg"], folder, existing)
        assert {file.name: file.read_text() for file in folder.glob("*.txt")} == {"2.txt": "one", "10.txt": "ten"}
        assert "2 could not be" in comfy.texts[-1][0]
    assert sum("longer than the file system takes" in message for message in caplog.messages) == 4
    with pytest.raises(ValueError, match=r"0 captions written.*2 could not be: .*longer than the file system"):
        save(["x", "y"], long, folder)


def test_a_jpeg_of_any_name_is_loaded(load, folder):
    draw("circle", "red", "blue").save(folder / "b.jfif", "JPEG")
    assert load(folder)[1][-1] == "b.jfif"


def test_a_fallback_takes_no_other_pictures_file(save, folder):
    names = ["a.png", "a.jpg", "a.png.png"]
    save(names, names, folder / "new")
    assert {file.name: file.read_text() for file in (folder / "new").iterdir()} == {
        f"{name}.txt": name for name in names
    }


def test_two_prompts_do_not_write_one_file_for_two_pictures_of_the_folder(save, folder):
    """As with the patterns *.png and *.jpg, one after the other."""
    draw("circle", "red", "blue").save(folder / "2.jpg")
    for name in ("2.png", "2.jpg", "10.jpg"):
        save([name], [name], folder, "overwrite")
    assert {file.name: file.read_text() for file in folder.glob("*.txt")} == {
        "2.png.txt": "2.png",
        "2.jpg.txt": "2.jpg",
        "10.txt": "10.jpg",
    }


def test_a_folder_of_any_depth_is_written_to(save, comfy):
    where = comfy.base / "output" / "/".join("d" * 1500)
    save(["one"], ["a.png"], "/".join("d" * 1500))
    assert (where / "a.txt").read_text() == "one"
    (where / "a.txt").unlink()
    while where != comfy.base / "output":  # rmtree does not follow so far
        where.rmdir()
        where = where.parent


def test_what_a_node_was_handed_is_not_repeated_whole(load, save, folder):
    for wrong in (lambda: load(folder, "*" * 100_000), lambda: save(["x"], ["/" * 100_000], folder)):
        with pytest.raises(ValueError) as refused:
            wrong()
        assert len(str(refused.value)) < 500


PRESETS = (
    "user/default/qwenvl/presets",
    "user/default/qwenvl/presets/more",
    "user/Default/QwenVL/Presets",
    "output/way",
)


@pytest.mark.parametrize("where", PRESETS)
def test_from_elsewhere_no_preset_is_replaced_for_everybody(save, comfy, pack, where):
    presets = pack.nodes.host.preset_folder()
    presets.mkdir(parents=True, exist_ok=True)
    way = comfy.base / "output" / "way"
    if not way.is_symlink():
        way.symlink_to(presets)
    before = {file.name for file in presets.iterdir()}
    comfy.args.listen = "0.0.0.0"
    with pytest.raises(ValueError, match="presets of everybody"):
        save(["Say nothing."], ["tags_for_a_training_set.png"], comfy.base / where)
    assert {file.name for file in presets.iterdir()} == before
    save(["x"], ["a.png"], comfy.base / "user/default/qwenvl/presets of mine")


def test_at_this_machine_presets_may_be_written(save, pack):
    presets = pack.nodes.host.preset_folder()
    save(["Say nothing."], ["nothing.png"], presets)
    assert (presets / "nothing.txt").read_text() == "Say nothing."
    (presets / "nothing.txt").unlink()


def test_the_nodes_are_explained(nodes):
    for name in ("QwenVLBoxes", "QwenVLLoadFolder", "QwenVLSaveCaptions"):
        node = nodes[name]
        declared = node.INPUT_TYPES()
        inputs = {**declared["required"], **declared.get("optional", {})}
        assert [key for key, (_, options) in inputs.items() if not options.get("tooltip")] == []
        assert node.DESCRIPTION and node.SEARCH_ALIASES
        assert node.CATEGORY == "QwenVL"
        assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)


def test_saving_ends_a_graph(nodes):
    assert nodes["QwenVLSaveCaptions"].OUTPUT_NODE
    assert not getattr(nodes["QwenVLLoadFolder"], "OUTPUT_NODE", False)
