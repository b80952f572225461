"""The files that are made of others are up to date. What lacks a translation is a warning, until it is published."""

import warnings

import help_pages
import node_texts
import pytest
import texts
from pictures import ROOT


class UntranslatedWarning(UserWarning):
    """A text that other languages show in English."""


def test_the_files_are_made_of_the_newest_texts_and_templates(pack):
    assert [str(file.relative_to(ROOT)) for file in texts.stale(pack)] == [], "run: python3 tests/texts"


def test_what_lacks_a_translation_is_told(pack):
    if lines := texts.untranslated(pack):
        warnings.warn("\n".join(lines), UntranslatedWarning, stacklevel=1)


@pytest.mark.release
def test_no_text_lacks_a_translation_and_none_is_left_of_a_text_that_has_changed(pack):
    assert texts.untranslated(pack) == [], "to translate by the English text, or to look at what it has become"


def test_a_text_that_changes_in_python_is_named_and_shown_in_english(pack, monkeypatch):
    node = pack.NODE_CLASS_MAPPINGS["Qwen"]
    before = node.DESCRIPTION
    monkeypatch.setattr(node, "DESCRIPTION", "Ask something else.")
    node_texts.english.cache_clear()
    try:
        assert "zh/texts.json has no translation of 'Ask something else.'" in texts.untranslated(pack)
        assert f"zh/texts.json: this is said no longer: {before!r}" in texts.untranslated(pack)
        result = texts.made(pack)
        assert '"description": "Ask something else."' in result[node_texts.file("zh")]
        assert "\n\nAsk something else.\n\n" in result[help_pages.file("Qwen", "zh")]
        assert {node_texts.file("zh"), node_texts.file("en"), help_pages.file("Qwen", "de")} <= set(texts.stale(pack))
    finally:
        node_texts.english.cache_clear()


def test_a_page_whose_english_has_changed_is_named(pack, monkeypatch):
    monkeypatch.setattr(help_pages, "mark", lambda _: "another")
    assert "fr/help/Qwen.md was made of an older English text" in texts.untranslated(pack)


def test_the_command_makes_what_is_stale_and_nothing_else(pack, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(node_texts, "ROOT", tmp_path)
    monkeypatch.setattr(node_texts, "pack", lambda: pack)
    monkeypatch.setattr(texts, "made", lambda _: {tmp_path / "folder" / "é.md": "né", tmp_path / "there": "same"})
    monkeypatch.setattr(texts, "untranslated", lambda _: ["zh lacks a text"])
    (tmp_path / "there").write_text("same")
    for told in ("made folder/é.md\n", ""):
        assert texts.main() == 0
        assert capsys.readouterr() == (told, "zh lacks a text\n")
    assert (tmp_path / "folder" / "é.md").read_text(encoding="utf-8") == "né"
