"""The templates: workflows that ComfyUI lists, and the same graphs as its API takes them.

The workflows are edited in ComfyUI and saved in its own format; texts.py makes the graphs of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
FOLDER = _ROOT / "example_workflows"
# What they ask about, which web/samples.js puts into ComfyUI's input folder.
SAMPLES = _ROOT / "web" / "samples"
_SQUARE = "a red square on a blue background"
# Template -> the answers of its Qwen node. The folder holds a red circle on blue and a yellow square on green.
ANSWERS = {
    "Describe an image": [_SQUARE],
    "Compare two images": [f"Image 1: {_SQUARE}; image 2: {_SQUARE.replace('red', 'yellow')}"],
    "One caption per image": [_SQUARE, _SQUARE.replace("red", "yellow"), _SQUARE.replace("red", "white")],
    "Image to prompt to image": [_SQUARE],
    "Describe a video": ["a red square"],
    "Enhance a prompt": ["a cat, highly detailed, sharp focus, soft lighting"],
    "Caption a folder": ["red circle, blue background", "yellow square, green background"],
    "Find objects": ['[{"bbox_2d": [330, 100, 650, 460], "label": "yellow square"}]'],
}
# Those that end in a sampler need a checkpoint, which nobody has by that name for certain.
DIFFUSION = ("Enhance a prompt", "Image to prompt to image")
# What the page keeps to itself.
NOTES = ("Note", "MarkdownNote")
# The page puts a widget of its own behind these: what becomes of the number after a run.
SEEDS = ("seed", "noise_seed")

Workflow = dict[str, Any]
Graph = dict[str, dict[str, Any]]


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def workflow(name: str) -> Workflow:
    """As the page opens it."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def graph(name: str) -> Graph:
    """As POST /prompt takes it."""
    return json.loads(graph_file(name).read_text(encoding="utf-8"))


def graph_file(name: str) -> Path:
    # A folder deeper than ComfyUI looks for templates.
    return FOLDER / "api" / f"{name}.json"


def widget_names(node: dict[str, Any]) -> list[str]:
    """The names of a node's widgets in the order of its values; a seed's companion has none."""
    found = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    return [value for name in found for value in ((name, "") if name in SEEDS else (name,))]


def put_samples(folder: Path) -> None:
    """As the page does it with those that a template names."""
    folder.mkdir(exist_ok=True)
    for sample in SAMPLES.iterdir():
        shutil.copy(sample, folder)


def converted(saved: Workflow) -> Graph:
    """The graph that the page would post, without nodes that nothing is connected to."""
    links = {number: [str(source), slot] for number, source, slot, *_ in saved["links"]}
    return {
        str(node["id"]): {"class_type": node["type"], "inputs": _inputs(node, links)}
        for node in saved["nodes"]
        if node["type"] not in NOTES and not _spare(node)
    }


def _spare(node: dict[str, Any]) -> bool:
    """A node that gives something to nobody; those that show or save give nothing."""
    return bool(node["outputs"]) and not any(slot.get("links") for slot in node["outputs"])


def _inputs(node: dict[str, Any], links: dict[int, list[Any]]) -> dict[str, Any]:
    values = dict(zip(widget_names(node), node.get("widgets_values", []), strict=True))
    connected = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
    return {name: value for name, value in values.items() if name} | connected
