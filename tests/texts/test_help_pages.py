"""The help pages: there for every node in every language, made of the newest texts, with pictures that are there."""

import re

import help_pages
import node_texts
import pytest
from PIL import Image

LANGUAGES = ("en", *node_texts.LANGUAGES)
PICTURE_BYTES = 100_000
each_node = pytest.mark.parametrize("name", help_pages.NODES)
each_language = pytest.mark.parametrize("language", node_texts.LANGUAGES)


@pytest.fixture(scope="module")
def offered(_comfy_and_pack):
    """What the lists of the nodes offer."""
    declared = [node.INPUT_TYPES() for node in _comfy_and_pack[1].NODE_CLASS_MAPPINGS.values()]
    inputs = [entry for groups in declared for group in groups.values() for entry in group.values()]
    return {value for kind, _ in inputs if isinstance(kind, list) for value in kind}


def test_every_id_has_a_page_in_every_language_and_nothing_else_has(pack):
    assert {*help_pages.NODES, *help_pages.OLD} == set(pack.NODE_CLASS_MAPPINGS)
    wanted = {help_pages.file(name, language) for name in pack.NODE_CLASS_MAPPINGS for language in LANGUAGES}
    assert set(help_pages.FOLDER.rglob("*.md")) == wanted


@each_node
def test_every_input_and_output_is_explained(pack, name):
    page, kind = help_pages.page(pack, name, "en"), pack.NODE_CLASS_MAPPINGS[name]
    groups = kind.INPUT_TYPES()
    for value in (*groups["required"], *groups.get("optional", {}), *kind.RETURN_NAMES):
        assert re.search(rf"^\| {value} \|.* [^ |]+ \|$", page, re.MULTILINE), value


@each_language
@each_node
def test_something_is_told(name, language):
    assert help_pages.translation(name, language)[1].strip()


@each_language
@each_node
def test_a_translation_tells_as_much_and_names_the_same_inputs_and_values(offered, name, language):
    if not help_pages.is_current(name, language):
        pytest.skip("It was made of an older English text.")
    english, told = help_pages.translation(name, "en")[1], help_pages.translation(name, language)[1]
    for what in (r"^- ", r"^## "):
        assert len(re.findall(what, told, re.MULTILINE)) == len(re.findall(what, english, re.MULTILINE))
    assert sorted(re.findall(r"\{\w+\}", told)) == sorted(re.findall(r"\{\w+\}", english))
    values = {value for value in re.findall(r"\*([^*]+)\*", english) if value in offered}
    assert [value for value in values if f"*{value}*" not in told] == []


@each_node
def test_a_page_has_a_small_picture_where_the_page_looks_for_it(name):
    """Beside web/docs/<node>.md, also for web/docs/<node>/<language>.md."""
    for language in LANGUAGES:
        page = help_pages.file(name, language).read_text(encoding="utf-8")
        (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", page)
        file = help_pages.FOLDER / picture
        assert file.stat().st_size < PICTURE_BYTES
        with Image.open(file) as opened:
            assert min(opened.size) >= 150
