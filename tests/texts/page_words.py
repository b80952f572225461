"""The words of the page's scripts in other languages; texts.py makes the file that web/words.js reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import node_texts
import templates

FOLDER = node_texts.ROOT / "web"
FILE = FOLDER / "words.json"
# Choices that are no words.
SAME = {"4bit", "8bit", "0-1000", "OCR", "cpu"}
_HEADING = re.compile(r"^(## |\d {2})")
_CALL = re.compile(r'\bword\(\s*("(?:[^"\\]|\\.)*")')


def scripts() -> list[Path]:
    return sorted(FOLDER.glob("*.js"))


def english() -> set[str]:
    """Every word that a script says, by word("..."), and all that scripts translate of the nodes and templates."""
    said = [found for script in scripts() for found in _CALL.findall(_code(script))]
    return {*(json.loads(entry) for entry in said), *of_templates(), *choices()}


def of_templates() -> set[str]:
    """What web/notes.js translates: paragraphs of notes, and titles of nodes and groups, without their numbers."""
    said: set[str] = set()
    for workflow in map(templates.workflow, templates.names()):
        for node in workflow["nodes"]:
            said.add(node.get("title", ""))
            if node["type"] in templates.NOTES:
                said |= set(node["widgets_values"][0].split("\n\n"))
        said |= {group["title"] for group in workflow["groups"]}
    return {_HEADING.sub("", entry) for entry in said} - {""}


def choices() -> set[str]:
    """The choices of lists that are words: those that come with the pack, whatever this machine has."""
    return {entry for offered in node_texts.choices().values() for entry in offered if entry not in SAME}


def _code(script: Path) -> str:
    """Without the comments that fill a line."""
    lines = script.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("//", "/*", "*")))


def made() -> str:
    """What the file must hold: language -> English -> what it is there."""
    table = {language: _in(language) for language in node_texts.LANGUAGES}
    return json.dumps(table, ensure_ascii=False, indent=1) + "\n"


def _in(language: str) -> dict[str, str]:
    """English -> what it is there. In notes, {top_p} stands for what that input is called."""
    meanings, notes = node_texts.meanings(language), of_templates()
    known = [text for text in sorted(english()) if text in meanings]
    return {entry: node_texts.translated(entry, meanings) if entry in notes else meanings[entry] for entry in known}
