"""The texts of the nodes in other languages: what is translated says the same of the same inputs and values."""

import re
from itertools import chain

import node_texts
import pytest

each_language = pytest.mark.parametrize("language", node_texts.LANGUAGES)
# What the library that the page translates with takes for commands of its own.
SPECIAL = set("{}@|")
# Names, numbers, paths and commands, which are the same everywhere.
SAME = re.compile(r"\w+(?:[_/.]\w+)+|Qwen[\w.-]*\w|QWENVL\w+|\d+(?:-\d+)?")


@pytest.fixture(scope="module")
def words(_comfy_and_pack):
    return node_texts.english(_comfy_and_pack[1])


def with_meaning(words, meanings):
    """The texts that have a translation."""
    return [text for text in node_texts.texts(words) if text in meanings]


def input_names(words):
    return {name for node in words.values() for name in node.get("inputs", {})}


def test_there_is_a_folder_for_every_language_and_no_other():
    assert {folder.name for folder in node_texts.FOLDER.iterdir()} == {"en", *node_texts.LANGUAGES}


@pytest.mark.parametrize("language", ["en", *node_texts.LANGUAGES])
def test_no_text_holds_what_the_page_takes_for_a_command(words, language):
    shown = words if language == "en" else node_texts.translated(words, node_texts.meanings(language))
    assert [text for text in node_texts.texts(shown) if SPECIAL & set(text)] == []


@each_language
def test_every_sentence_is_translated(words, language):
    meanings = node_texts.meanings(language)
    sentences = [text for text in with_meaning(words, meanings) if text.endswith(".")]
    assert len(sentences) > 50
    assert [text for text in sentences if meanings[text] == text or not meanings[text].strip()] == []


@each_language
def test_names_numbers_and_commands_stay_as_they_are(words, language):
    meanings, inputs = node_texts.meanings(language), input_names(words)
    lost = {
        (one_input, text)
        for text in with_meaning(words, meanings)
        for one_input in set(SAME.findall(text)) - inputs
        if text not in inputs and one_input not in meanings[text] and not text.startswith("Qwen2VL")
    }
    assert lost == set()


@each_language
def test_inputs_are_called_in_tooltips_what_they_are_called_on_the_node(words, language):
    meanings, inputs = node_texts.meanings(language), input_names(words)
    for text in set(with_meaning(words, meanings)) - inputs:
        named = {name for name in re.findall(r"\w+_\w+", text) if name in inputs}
        assert named <= set(re.findall(r"\{(\w+)\}", meanings[text])), text


@each_language
def test_values_of_lists_are_not_translated(pack, language):
    """They are values: what the list offers is what a tooltip has to name."""
    meanings = node_texts.meanings(language)
    checked = 0
    for node in pack.NODE_CLASS_MAPPINGS.values():
        groups = node.INPUT_TYPES()
        for name, (kind, options) in chain.from_iterable(group.items() for group in groups.values()):
            if not isinstance(kind, list) or name == "model" or options["tooltip"] not in meanings:
                continue
            # on, off and none are words as well.
            named = [
                value for value in kind if _names(value, options["tooltip"]) and value not in ("on", "off", "none")
            ]
            checked += len(named)
            assert [value for value in named if not _names(value, meanings[options["tooltip"]])] == []
    assert checked > 20


def _names(value, text):
    """Whether the text has the value as words of their own; letters that are not ASCII may stand right beside it."""
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(value)}(?![A-Za-z0-9_])", text) is not None


@each_language
def test_no_two_inputs_of_a_node_have_one_name(words, language):
    for node in node_texts.translated(words, node_texts.meanings(language)).values():
        names = [entry["name"] for entry in node.get("inputs", {}).values()]
        assert len(set(names)) == len(names)


def test_an_id_with_a_dot_has_its_name_where_the_page_looks_for_it(pack, words):
    """The page looks for what belongs to a node under its id: for its inputs with dots made _, for its name without."""
    for name in pack.NODE_CLASS_MAPPINGS:
        found = words
        for step in name.split("."):
            found = found[step]
        assert found["display_name"] == pack.NODE_DISPLAY_NAME_MAPPINGS[name]
        assert set(words[name.replace(".", "_")]) == {"display_name", "description", "inputs", "outputs"}
