"""Lists in a node's inputs: one run per item, as ComfyUI itself does it, or one run for all pictures together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def runs(given: Mapping[str, Any], pictures: Collection[str], together: bool) -> list[dict[str, Any]]:
    """Split the whole lists that ComfyUI passes to a node into the inputs of its runs.

    Args:
        given: input -> list, or a single value.
        pictures: the inputs that hold pictures.
        together: True if a run may take lists of pictures; if nothing else is a list, there is a single run then.
    """
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    lists = {name: values for name, values in lists.items() if values}
    longest = max((len(values) for name, values in lists.items() if not (together and name in pictures)), default=1)
    if together and longest == 1:
        return [{name: values if name in pictures else values[0] for name, values in lists.items()}]
    count = max((len(values) for values in lists.values()), default=1)
    # Short lists repeat their last item, as everywhere in ComfyUI.
    return [{name: values[min(at, len(values) - 1)] for name, values in lists.items()} for at in range(count)]


def first(value: Any) -> Any:
    """Unwrap a widget's value, which is a list if the node takes lists; None if a link will deliver it."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def named(name: str, value: Any) -> dict[str, Any]:
    """Name the pictures of an input for errors; several get numbers."""
    if not isinstance(value, list):
        return {name: value}
    if len(value) == 1:
        return {name: value[0]}
    return {f"{name} ({number} of {len(value)})": picture for number, picture in enumerate(value, 1)}
