"""The help that ComfyUI shows of a node in its language; texts.py makes the pages.

What is told of a node is in locales/<language>/help/<node>.md. Its inputs and outputs and the figures in a page come
from Python, in the words of node_texts.py. The first line of a translation holds the mark of the English that it was
made of: who has looked at a change of the English writes the new mark there.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import node_texts

from qwenvl.models import builtin
from qwenvl.settings import RESOLUTIONS

FOLDER = node_texts.ROOT / "web" / "docs"
NODES = ("QwenVL", "Qwen", "QwenVLBoxes", "QwenVLLoadFolder", "QwenVLSaveCaptions")
# Ids of older workflows: their pages name the node that they are.
OLD = {"Qwen2.5VL": "QwenVL", "Qwen2.5": "Qwen", "Qwen2VL": "QwenVL"}
OLD_ID = (
    "This is the node {node} under the id of older workflows, so that they open. New workflows use {node}; its help "
    "page tells of the inputs."
)
HEADINGS = (
    *("Inputs", "Outputs", "input", "output", "default", "meaning"),
    *("tokens of a picture, at most", "with Qwen3-VL and later", "one for 28 x 28 pixels", "one for 32 x 32 pixels"),
    "GB in memory: none",
)
# The sides of the square of pixels that is a token.
SIDES = (28, 32)
MEMORY = {
    "QwenVL": (
        *("Qwen3.5-0.8B", "Qwen3-VL-2B-Instruct", "Qwen3-VL-4B-Instruct", "Qwen3-VL-8B-Instruct"),
        *("Qwen3-VL-32B-Instruct", "Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-72B-Instruct"),
    ),
    "Qwen": ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B-Instruct-2507", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"),
}

Inputs = dict[str, tuple[Any, dict[str, Any]]]


def own_texts() -> set[str]:
    """What a page says beside the texts of the node and what is told of it."""
    return {*HEADINGS, OLD_ID}


def file(name: str, language: str) -> Path:
    return FOLDER / (f"{name}.md" if language == "en" else f"{name}/{language}.md")


def translation(name: str, language: str) -> tuple[str, str]:
    """(mark of the English that it was made of, what is told of a node in a language)"""
    told = (node_texts.FOLDER / language / "help" / f"{name}.md").read_text(encoding="utf-8")
    if language == "en":
        return mark(told), told
    first, _, rest = told.partition("\n")
    return first.removeprefix("<!-- of ").removesuffix(" -->"), rest


def mark(told: str) -> str:
    return f"{zlib.crc32(told.encode()):08x}"


def is_current(name: str, language: str) -> bool:
    """Whether what is told of a node was translated from what is told now."""
    return translation(name, language)[0] == translation(name, "en")[0]


def page(pack: ModuleType, name: str, language: str) -> str:
    """The whole page, in Markdown. A picture's name is looked for beside web/docs/<node>.md in every language."""
    words = node_texts.english(pack)
    meanings = {text: text for text in node_texts.texts(words) | own_texts()}
    if language != "en":
        meanings |= node_texts.meanings(language)
        words = node_texts.localized(words, meanings)
    node = words[name.replace(".", "_")]
    parts = [f"# {node['display_name']}", node["description"]]
    if name in OLD:
        parts.append(meanings[OLD_ID].replace("{node}", words[OLD[name]]["display_name"]))
    else:
        parts += [f"![{node['display_name']}]({name}.jpg)", _told(name, language, meanings)]
        parts += _inputs(_declared(pack, name), node["inputs"], meanings)
        parts += _outputs(node["outputs"], meanings)
    return "\n\n".join(parts) + "\n"


def _declared(pack: ModuleType, name: str) -> Inputs:
    groups = pack.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    return {**groups["required"], **groups.get("optional", {})}


def _told(name: str, language: str, meanings: dict[str, str]) -> str:
    """With the names of inputs, and the tables, in their places."""
    placed = {**meanings, "TOKENS": _tokens(meanings), "MEMORY": _memory(name, meanings)}
    return re.sub(r"\{(\w+)\}", lambda found: placed[found[1]], translation(name, language)[1]).strip()


def _inputs(declared: Inputs, shown: dict[str, Any], meanings: dict[str, str]) -> list[str]:
    rows = []
    for name, entry in shown.items():
        # A row is a line.
        tooltip = entry["tooltip"].replace("\n", " ")
        rows.append((_both(name, entry["name"]), _default(name, declared[name][1]), tooltip))
    heads = (meanings["input"], meanings["default"], meanings["meaning"])
    return [f"## {meanings['Inputs']}", _table(heads, rows)]


def _outputs(shown: dict[str, Any], meanings: dict[str, str]) -> list[str]:
    if not shown:
        return []
    rows = [(entry["name"], entry["tooltip"]) for entry in shown.values()]
    return [f"## {meanings['Outputs']}", _table((meanings["output"], meanings["meaning"]), rows)]


def _both(name: str, shown: str) -> str:
    """What an input is called on the node, and in graphs for the API where that is something else."""
    return name if shown == name else f"{shown} (`{name}`)"


def _default(name: str, options: dict[str, Any]) -> str:
    value = options.get("default", "")
    # That of a download is set by each machine.
    if value == "" or name == "download":
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _tokens(meanings: dict[str, str]) -> str:
    """What a picture costs at most, by image_resolution."""
    counts = {name: limits[1] for name, limits in RESOLUTIONS.items() if limits and name != "original"}
    counts = {"auto": max(counts.values()), **counts}
    rows = [(f"`{name}`", *(str(pixels // side**2) for side in SIDES)) for name, pixels in counts.items()]
    rows.append(("`original`", *(meanings[f"one for {side} x {side} pixels"] for side in SIDES)))
    heads = ("image_resolution", "tokens of a picture, at most", "with Qwen3-VL and later")
    return _table([meanings[head] for head in heads], rows)


def _memory(name: str, meanings: dict[str, str]) -> str:
    """GB of the weights of some models of the list, by quantization."""
    sizes = {model.name: model.size for model in (*builtin.vision(), *builtin.text()) if model.size}
    rows = [
        (model, *(f"{sizes[model].memory[kind] / 1e9:.1f}" for kind in ("none", "8bit", "4bit")))
        for model in MEMORY.get(name, ())
    ]
    return _table((meanings["model"], meanings["GB in memory: none"], "8bit", "4bit"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))
