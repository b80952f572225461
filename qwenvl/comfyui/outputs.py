"""Prompts whose only result is an answer of this pack's nodes, with nothing connected behind them.

ComfyUI refuses a prompt without an output node. The pack's nodes are not output nodes, because ComfyUI runs every
output node of a prompt, also those that are unconnected or in a branch that a switch leaves out. So if a prompt has no
other output node, a preview is put behind the pack's nodes.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from . import host

# ComfyUI's own output node, which takes any type.
PREVIEW = "PreviewAny"
_SUFFIX = "-answer"


def take_answers_for_outputs(names: Collection[str]) -> None:
    """Have ComfyUI's server put previews behind the nodes of these names; does nothing without a server."""
    add = getattr(host.server(), "add_on_prompt_handler", None)
    if add is not None:
        add(lambda queued: with_outputs(queued, names, _known()))


def _known() -> Mapping[str, Any]:
    """Return ComfyUI's node classes by name, from sys.modules, as a file of this pack is called nodes too."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def with_outputs(queued: dict[str, Any], names: Collection[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Put a preview, in place, behind each node of these names if the prompt has no other output node; if the prompt
    asks for certain nodes only (partial_execution_targets), behind those of them that it asks for."""
    prompt, targets = queued.get("prompt"), queued.get("partial_execution_targets")
    if not isinstance(prompt, dict) or PREVIEW not in known:
        return queued
    ours = [number for number, node in prompt.items() if _class_of(node) in names]
    if isinstance(targets, list):
        ours = [number for number in ours if number in targets]
        others = [number for number in targets if number not in ours]
        queued["partial_execution_targets"] = [*others, *(f"{number}{_SUFFIX}" for number in ours)]
    elif any(getattr(known.get(_class_of(node)), "OUTPUT_NODE", False) for node in prompt.values()):
        return queued
    for number in ours:
        prompt[f"{number}{_SUFFIX}"] = {"class_type": PREVIEW, "inputs": {"source": [number, 0]}}
    return queued


def _class_of(node: Any) -> str:
    return str(node.get("class_type")) if isinstance(node, dict) else ""
