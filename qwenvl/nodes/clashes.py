"""Other packs that register nodes under our ids. ComfyUI keeps the one that it read last, and says nothing."""

from __future__ import annotations

from collections.abc import Mapping

from ..comfyui import host
from ..log import log


def warn_of_clashes(ours: Mapping[str, type]) -> None:
    """Log a line for each other pack with one of our ids: now for packs read before ours, at server start for others.

    Args:
        ours: the nodes of this pack by id; not registered yet.
    """
    _warn(clashes(ours, host.registered_nodes()))
    host.when_server_starts(lambda: _warn(clashes(ours, host.registered_nodes())))


def clashes(ours: Mapping[str, type], registered: Mapping[str, type]) -> dict[str, list[str]]:
    """Find the ids of ours under which another class is registered, by the folder of its pack. Pure."""
    found: dict[str, list[str]] = {}
    for name, node in ours.items():
        other = registered.get(name)
        if other is not None and other is not node:
            module = str(getattr(other, "RELATIVE_PYTHON_MODULE", other.__module__))
            found.setdefault(module.removeprefix("custom_nodes."), []).append(name)
    return found


def _warn(found: Mapping[str, list[str]]) -> None:
    for folder, names in found.items():
        log.warning(
            "custom_nodes/%s has nodes of the same names (%s). ComfyUI keeps one of the two only: "
            "remove that folder or this one.",
            folder,
            ", ".join(names),
        )
