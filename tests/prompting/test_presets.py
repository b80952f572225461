import logging
import os
from pathlib import Path

import pytest
from pictures import draw

from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import run
from qwenvl.prompting import presets
from qwenvl.prompting.presets import BUILT_IN, NONE, Preset, UnknownPresetError, find, listed, names
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import SYSTEM_PROMPT

BUILT_IN_NAMES = {
    "describe briefly",
    "describe in detail",
    "tags for a training set",
    "diffusion prompt from an image",
    "enhance a prompt",
    "OCR",
    "find objects as JSON",
    "compare two images",
    "describe the video",
}

# (pictures, whether there is a video) that are enough for every preset.
PLENTY = ((2, False), (0, True), (1, True))
# Each line holds the one before it ten times.
BILLION_LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's own folder, not made yet."""
    folder = tmp_path / "presets"
    monkeypatch.setattr("qwenvl.comfyui.host.preset_folder", lambda: folder)
    return folder


@pytest.fixture
def write(own):
    def file(name, content):
        own.mkdir(exist_ok=True)
        path = own / name
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
        return path

    return file


class Silent:
    def check(self): ...
    def stage(self, state, **_): ...
    def update(self, *_): ...
    def end(self, text): ...
    def advance(self, *_): ...


def answer(models, name, text="", pictures=()):
    system, question = find(name).fill(SYSTEM_PROMPT, text)
    images = {f"image{number}": picture for number, picture in enumerate(pictures, 1)}
    asked = Request(LoadSpec(DEMO), question, system, images, sampling=Sampling(do_sample=False, max_new_tokens=80))
    return run(asked, models, Silent()).text


@pytest.fixture
def circle(tmp_path):
    draw("circle", "red", "blue").save(tmp_path / "circle.png")
    return tmp_path / "circle.png"


@pytest.fixture
def square(tmp_path):
    draw("square", "yellow", "green").save(tmp_path / "square.png")
    return tmp_path / "square.png"


def test_none_comes_first_and_then_ours_although_there_is_no_folder_of_the_user(own):
    assert names()[0] == NONE
    assert set(names()[1:]) == BUILT_IN_NAMES


def test_every_file_of_ours_is_a_preset_with_a_place_for_what_was_typed(own, caplog):
    assert len(listed()) == len(list(BUILT_IN.iterdir()))
    assert caplog.text == ""
    assert [name for name, preset in listed().items() if "{text}" not in preset.text] == []


def test_none_leaves_everything_as_it_was(own):
    assert find(NONE).fill(" S ", "  T\n") == (" S ", "  T\n")


def test_text_is_put_into_its_place_once_and_braces_around_it_are_kept():
    preset = Preset(text='Find {text} as {"bbox_2d": [0, 1]}.')
    assert preset.fill("S", "{text} {system}{}") == ("S", 'Find {text} {system}{} as {"bbox_2d": [0, 1]}.')


def test_text_without_a_place_stands_below():
    assert Preset(text="Describe.").fill("", "In French") == ("", "Describe.\n\nIn French")
    assert Preset(text="Describe.\n").fill("", "  ") == ("", "Describe.")


@pytest.mark.parametrize(
    ("template", "typed", "filled"),
    [
        ("Be brief.", SYSTEM_PROMPT, "Be brief."),
        ("Be brief.", "", "Be brief."),
        ("Be brief.", "In French.", "Be brief.\n\nIn French."),
        ("{system} Be brief.", "In French.", "In French. Be brief."),
        ("", "In French.", "In French."),
        ("", SYSTEM_PROMPT, SYSTEM_PROMPT),
    ],
)
def test_a_system_prompt_takes_the_place_of_the_default_and_keeps_the_users(template, typed, filled):
    assert Preset(system=template, text="x").fill(typed, "")[0] == filled


def test_the_users_files_are_listed_after_ours_as_they_come_and_go(write):
    before = names()
    file = write("my_tags.yaml", "system: You tag.\ntext: |\n  Tags for {text}\n")
    write("plain.txt", "\ufeffWrite about {text}.\n")
    assert names() == (*before, "my tags", "plain")
    assert find("my tags").fill(SYSTEM_PROMPT, "a cat") == ("You tag.", "Tags for a cat")
    assert find("plain").fill("S", "a cat") == ("S", "Write about a cat.")
    file.write_text("text: Changed")
    assert find("my tags").fill("", "") == ("", "Changed")
    file.unlink()
    assert names() == (*before, "plain")


def test_a_preset_of_the_user_takes_the_place_of_ours(write):
    write("describe_briefly.txt", "Mine")
    assert find("describe briefly") == Preset(text="Mine")
    assert names().count("describe briefly") == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.yaml", "text: [", "line 1"),
        ("bad.yaml", "- text", "must hold"),
        ("bad.yaml", "", "must hold"),
        ("bad.yaml", "text: {text}", "'text' must be text"),
        ("bad.yaml", "text: x\nsystem: [a]", "'system' must be text"),
        ("bad.yaml", "txet: x", "'txet'"),
        ("bad.yaml", "text: ' '", "empty"),
        ("bad.yaml", "needs: a picture", "empty"),
        ("bad.yaml", "text: x\nneeds: three pictures", "a picture, two pictures, a video; it is 'three pictures'"),
        ("bad.yaml", "text: x\nneeds: [a picture]", "'needs' must be text"),
        ("bad.yaml", "!!python/object/apply:os.system ['true']", "begins with !"),
        ("bad.yaml", "[" * 50_000, "nested too deep"),
        ("bad.yaml", "- " * 40_000, "recursion"),
        ("bad.yaml", "text: !!bool x", "begins with !"),
        ("bad.yaml", "text: !!timestamp x", "begins with !"),
        ("bad.yaml", "text: !!str [a]", "begins with !"),
        ("bad.yaml", "text: !Look at it", "in quotes"),
        ("bad.yaml", "text: *Look*", "in quotes"),
        ("bad.yaml", "text: &a x\nsystem: [*a]", "& or *"),
        ("bad.yaml", BILLION_LAUGHS, "& or *"),
        ("bad.yaml", "text: x\n<<: {system: y}", "'<<'"),
        ("bad.yaml", "? [a]\n: x", "line 1, column 3"),
        ("bad.txt", b"\xff\xfe\xff", "utf-8"),
        ("bad.txt", "x" * 100_001, "larger than"),
        ("bad.txt", " \n", "empty"),
        ("none.txt", "x", "already means no preset"),
    ],
)
def test_a_broken_file_costs_itself_only_and_is_named_once_with_its_reason(write, caplog, name, content, reason):
    write("good.txt", "Good")
    file = write(name, content)
    for _ in range(2):
        assert set(listed()) == {*BUILT_IN_NAMES, "good"}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(file) in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("value", ["yes", "5", "~", "2024-13-45", "1:" * 300 + "1.5", "<<", "What! A dog & a *cat*"])
def test_every_value_is_text(write, caplog, value):
    """To YAML, some of these are no text, and one is a day that does not exist."""
    write("mine.yaml", f"text: {value}\nsystem:\n")
    assert find("mine") == Preset(text=value)
    assert caplog.text == ""


def test_of_two_files_with_one_name_the_first_counts(write, caplog):
    write("mine.txt", "One")
    write("mine.yaml", "text: Two")
    assert find("mine").text == "One"
    assert "mine.yaml" in caplog.text


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_costs_itself_only(write, caplog):
    write("secret.txt", "x").chmod(0)
    assert set(listed()) == BUILT_IN_NAMES
    assert "secret.txt" in caplog.text


def test_other_files_and_folders_are_no_presets(write):
    for name in (".hidden.txt", "notes.md", "text.yaml~"):
        write(name, "x")
    (presets.host.preset_folder() / "folder").mkdir()
    assert set(listed()) == BUILT_IN_NAMES


@pytest.mark.parametrize("name", ["gone", "../secret", "{folder}/../secret", "describe briefly.yaml", "", "..", "."])
def test_a_name_that_is_not_listed_is_an_error_that_says_where_it_would_be(write, own, name):
    write("good.txt", "Good")
    (own.parent / "secret.txt").write_text("secret")
    name = name.format(folder=own)
    with pytest.raises(UnknownPresetError) as caught:
        find(name)
    message = str(caught.value)
    assert message.startswith(f"preset {name!r} does not exist")
    assert str(own) in message
    assert "good" in message
    assert "secret.txt" not in message


@pytest.mark.parametrize(
    ("name", "pictures", "has_video"),
    [
        *((name, 1, False) for name in sorted(BUILT_IN_NAMES - {"compare two images", "describe the video"})),
        *((name, count, video) for name in ("compare two images", "describe the video") for count, video in PLENTY),
        *((name, 0, False) for name in (NONE, "enhance a prompt")),
        *((name, 0, True) for name in sorted(BUILT_IN_NAMES)),
    ],
)
def test_a_preset_is_content_with_what_it_needs(own, name, pictures, has_video):
    presets.require_shown(name, pictures, has_video)


@pytest.mark.parametrize(
    ("name", "pictures", "told"),
    [
        *((name, 0, "shown none") for name in sorted(BUILT_IN_NAMES - {"enhance a prompt"})),
        *((name, 1, "shown only one picture") for name in ("compare two images", "describe the video")),
    ],
)
def test_a_preset_that_has_nothing_to_look_at_is_an_error(own, name, pictures, told):
    with pytest.raises(presets.NothingShownError, match=f"preset '{name}' needs (a|two) .*{told}"):
        presets.require_shown(name, pictures, False)


def test_a_preset_of_the_user_says_what_it_needs(write):
    write("mine.yaml", "text: Look.\nneeds: a picture")
    presets.require_shown("mine", 1, False)
    with pytest.raises(presets.NothingShownError, match="preset 'mine' needs a picture"):
        presets.require_shown("mine", 0, False)


def test_the_stamp_changes_with_the_file(write):
    stamps = [presets.stamp("mine")]
    for content in ("One", "Two"):
        write("mine.txt", content)
        stamps += [presets.stamp("mine")] * 2
    assert len(set(stamps)) == 3
    assert presets.stamp(NONE) == presets.stamp(None) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("describe briefly", "a red circle on a blue background"),
        ("describe in detail", "a red circle on a blue background"),
        ("diffusion prompt from an image", "a red circle on a blue background"),
        ("tags for a training set", "red circle, blue background"),
    ],
)
def test_pictures_are_described_as_the_preset_says(models, own, circle, name, expected):
    assert answer(models, name, pictures=[circle]) == expected


def test_objects_are_found_as_json(models, own, circle):
    assert answer(models, "find objects as JSON", pictures=[circle]).startswith('[{"bbox_2d": [')


def test_two_images_are_compared(models, own, circle, square):
    found = answer(models, "compare two images", pictures=[circle, square])
    assert found.index("red circle on a blue") < found.index("yellow square on a green")


def test_a_prompt_is_enhanced(models, own):
    assert answer(models, "enhance a prompt", "a cat").startswith("a cat, ")


def test_a_preset_of_the_user_reaches_the_model(models, write, circle):
    write("shout.yaml", "system: Answer in uppercase.\ntext: Describe this image. {text}\n")
    assert answer(models, "shout", pictures=[circle]) == "A RED CIRCLE ON A BLUE BACKGROUND"


def test_the_folder_without_comfyui_is_in_the_users_configuration():
    assert presets.host.preset_folder() == Path.home() / ".config" / "qwenvl" / "presets"
