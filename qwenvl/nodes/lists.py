"""Lists in a node's inputs: a run for each item, as ComfyUI itself does it, or one for all pictures together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def runs(given: Mapping[str, Any], pictures: Collection[str], together: bool) -> list[dict[str, Any]]:
    """The inputs of each run of a node that ComfyUI hands whole lists.

    Args:
        given: input -> list, or a single value.
        pictures: the inputs that hold pictures.
        together: whether a run may have lists of pictures, which is then the only run where nothing else is a list.
    """
    lists = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    lists = {name: values for name, values in lists.items() if values}
    longest = max((len(values) for name, values in lists.items() if not (together and name in pictures)), default=1)
    if together and longest == 1:
        return [{name: values if name in pictures else values[0] for name, values in lists.items()}]
    count = max((len(values) for values in lists.values()), default=1)
    # Short lists go on with their last item, as everywhere in ComfyUI.
    return [{name: values[min(at, len(values) - 1)] for name, values in lists.items()} for at in range(count)]


def first(value: Any) -> Any:
    """A widget's value, which comes in a list where the node is handed lists; None where a link will deliver it."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def named(name: str, value: Any) -> dict[str, Any]:
    """The pictures of an input by the name that errors give them: with a number where there are several."""
    if not isinstance(value, list):
        return {name: value}
    if len(value) == 1:
        return {name: value[0]}
    return {f"{name} ({number} of {len(value)})": each for number, each in enumerate(value, 1)}
