"""The files that are made of others: `python3 tests/texts` makes them anew, and says what lacks a translation.

They are what ComfyUI reads of the nodes in every language, the words of the page's scripts, the help pages, and the
templates' graphs for the API. A text without a translation is in them in English.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import help_pages
import node_texts
import page_words
import templates

LANGUAGES = ("en", *node_texts.LANGUAGES)


def made(pack: ModuleType) -> dict[Path, str]:
    """What each of the files must hold."""
    words = node_texts.english(pack)
    nodes = {node_texts.file(language): node_texts.made(language, words) for language in LANGUAGES}
    pages = {
        help_pages.file(name, language): help_pages.page(pack, name, language)
        for name in (*help_pages.NODES, *help_pages.OLD)
        for language in LANGUAGES
    }
    graphs = {templates.graph_file(name): _graph(name) for name in templates.names()}
    return {**nodes, **pages, **graphs, page_words.FILE: page_words.made()}


def stale(pack: ModuleType) -> dict[Path, str]:
    """Those of the files that hold something else, with what they must hold."""
    return {
        file: text
        for file, text in made(pack).items()
        if not file.is_file() or file.read_text(encoding="utf-8") != text
    }


def untranslated(pack: ModuleType) -> list[str]:
    """A line for each text that has no translation, and for each translation whose English has changed."""
    wanted = node_texts.texts(node_texts.english(pack)) | help_pages.own_texts() | page_words.english()
    lines = []
    for language in node_texts.LANGUAGES:
        there = set(node_texts.meanings(language))
        lines += [f"{language}/texts.json has no translation of {text!r}" for text in sorted(wanted - there)]
        lines += [f"{language}/texts.json: this is said no longer: {text!r}" for text in sorted(there - wanted)]
        old = [name for name in help_pages.NODES if not help_pages.is_current(name, language)]
        lines += [f"{language}/help/{name}.md was made of an older English text" for name in old]
    return lines


def _graph(name: str) -> str:
    return json.dumps(templates.converted(templates.workflow(name)), ensure_ascii=False, indent=2) + "\n"


def main() -> int:
    """Exit status 0. Needs torch, as the pack does; where it is not there, the tests' own environment is used."""
    if find_spec("torch") is None:
        sys.path.insert(0, str(node_texts.ROOT / "demo"))
        from environment import python

        return subprocess.run([python(), Path(__file__).parent], check=False).returncode
    pack = node_texts.pack()
    for file, text in stale(pack).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(f"made {file.relative_to(node_texts.ROOT).as_posix()}")
    for line in untranslated(pack):
        print(line, file=sys.stderr)
    return 0
