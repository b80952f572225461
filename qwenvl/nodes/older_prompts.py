"""API prompts of older packs: they name fewer inputs than the nodes have today, and a picture by another name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..comfyui import host

# Every pack had these, so a prompt without them is a mistake, which ComfyUI tells.
ALWAYS_NAMED = ("text", "prompt", "model")


def take_them(nodes: Mapping[str, Any]) -> None:
    """Have ComfyUI's server complete what is queued for these nodes, where there is a server."""
    add = getattr(host.server(), "add_on_prompt_handler", None)
    if add is not None:
        add(lambda queued: complete(queued, nodes))


def complete(queued: dict[str, Any], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The same prompt, with what these nodes require besides a question and a model: defaults where it names none."""
    prompt = queued.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        if isinstance(node, dict) and str(node.get("class_type")) in nodes and isinstance(node.get("inputs"), dict):
            _complete(node["inputs"], nodes[node["class_type"]].INPUT_TYPES())
    return queued


def _complete(inputs: dict[str, Any], declared: dict[str, Any]) -> None:
    for name, (_, options) in declared["required"].items():
        if "default" in options and name not in ALWAYS_NAMED:
            inputs.setdefault(name, options["default"])
    known = {**declared["required"], **declared.get("optional", {})}
    if "image" in inputs and "image" not in known and "image1" in known:
        inputs.setdefault("image1", inputs.pop("image"))
