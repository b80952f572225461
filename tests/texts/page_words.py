"""The words of the page's scripts in other languages; texts.py makes the file that web/words.js reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import node_texts

FOLDER = node_texts.ROOT / "web"
FILE = FOLDER / "words.json"
_CALL = re.compile(r'\bword\(\s*("(?:[^"\\]|\\.)*")')


def scripts() -> list[Path]:
    return sorted(FOLDER.glob("*.js"))


def english() -> set[str]:
    """Every word that a script says, by word("...")."""
    said = [found for script in scripts() for found in _CALL.findall(_code(script))]
    return {json.loads(each) for each in said}


def _code(script: Path) -> str:
    """Without the comments that fill a line."""
    lines = script.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("//", "/*", "*")))


def made() -> str:
    """What the file must hold: language -> English -> what it is there."""
    words = sorted(english())
    table = {
        language: {each: meanings[each] for each in words if each in meanings}
        for language in node_texts.LANGUAGES
        for meanings in [node_texts.meanings(language)]
    }
    return json.dumps(table, ensure_ascii=False, indent=1) + "\n"
