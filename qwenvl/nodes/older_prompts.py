"""Completion of API prompts of older packs, which lack inputs of today's nodes and call image1 image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..comfyui import host

# Every older pack had these, so a prompt without them is a mistake, which ComfyUI reports.
ALWAYS_NAMED = ("text", "prompt", "model")


def take_them(nodes: Mapping[str, Any]) -> None:
    """Have ComfyUI's server complete queued prompts that use these nodes; does nothing without a server."""
    add = getattr(host.server(), "add_on_prompt_handler", None)
    if add is not None:
        add(lambda queued: complete(queued, nodes))


def complete(queued: dict[str, Any], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in, in place, what these nodes lack: defaults of required inputs except question and model; image1."""
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
