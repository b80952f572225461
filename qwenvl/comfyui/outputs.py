"""A prompt whose only aim is an answer of ours is run, though nothing is connected to the node.

ComfyUI runs what an output node needs, and refuses a prompt that has none. Our nodes are none themselves: ComfyUI runs
every output node that it is sent, so those of a branch that a switch leaves out, and those that lie about unconnected,
would be run too. Where there is no other output, one is put behind them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from . import host

# ComfyUI's own, which takes anything.
PREVIEW = "PreviewAny"
_SUFFIX = "-answer"


def take_answers_for_outputs(names: Collection[str]) -> None:
    """Have ComfyUI's server do so for the nodes of these names, where there is a server."""
    add = getattr(host.server(), "add_on_prompt_handler", None)
    if add is not None:
        add(lambda queued: with_outputs(queued, names, _known()))


def _known() -> Mapping[str, Any]:
    """All node classes of ComfyUI, by name. It has them in a module that is called as ours is."""
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})


def with_outputs(queued: dict[str, Any], names: Collection[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with a preview behind each node of these names if nothing else is an output, or behind each of them
    that is asked for by itself."""
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
