"""Whether a model folder is sound: its description held against its weights and its processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import LoadError
from ..models.checkpoint import part, read_json_object
from ..models.download import weight_headers

# Numbers of a model for each byte on disk: two where they have four bits each, and as much again to be safe.
_MOST_PER_BYTE = 8
_LAYERS = ("num_hidden_layers", "depth", "num_experts", "num_local_experts")
# What a processor calls the sides of a patch, and what config.json calls them.
_PATCHES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}
# Pixels to which anything may be enlarged: two frames of 8 million.
_MOST_ENLARGED = 1 << 24


def require_backing(folder: Path, build: Callable[[], torch.nn.Module]) -> None:
    """Raise LoadError where config.json claims a model that the weights are far too small for.

    It would fill the memory before anybody noticed, because what is not on disk is made up.

    Args:
        build: makes the model of the configuration; called where its numbers take no memory.
    """
    tensors = [tensor for _, tensor in weight_headers(folder)]
    if not tensors:
        return  # there is nothing to load, which is said elsewhere
    most = len(tensors) + max((side for tensor in tensors for side in tensor["shape"]), default=0)
    config = read_json_object(folder / "config.json")
    for section in (config, part(config, "text_config"), part(config, "vision_config")):
        if claimed := [name for name, value in section.items() if _amount(name, value) > most]:
            raise LoadError(_unlike(folder, f"{claimed[0]} is more than they can hold"))
    with torch.device("meta"):
        model = build()
    count = sum(each.numel() for each in (*model.parameters(), *model.buffers()))
    stored = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
    if count > _MOST_PER_BYTE * stored:
        raise LoadError(_unlike(folder, f"it has {count:.1e} numbers, and they have {stored:.1e} bytes"))


def why_unfit(processor: Any, vision: Any) -> str | None:
    """Why an image or video processor cannot serve the model, or None.

    It may cut into other patches than the vision tower takes, or enlarge what is small beyond all measure.

    Args:
        processor: transformers'.
        vision: the model's vision_config.
    """
    for setting, expected in _PATCHES.items():
        has, wants = getattr(processor, setting, None), getattr(vision, expected, None)
        if None not in (has, wants) and has != wants:
            return f"its processor has {setting} {has!r:.99}, and config.json has {expected} {wants!r:.99}"
    smallest, largest = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not 0 < smallest <= min(largest, _MOST_ENLARGED):
        return f"its processor makes {smallest!r:.99} to {largest!r:.99} pixels of whatever it is shown"
    return None


def _amount(name: str, value: Any) -> int:
    """How many parts of a model a setting asks for."""
    if isinstance(value, list):
        return len(value)
    return value if name in _LAYERS and isinstance(value, int) else 0


def _unlike(folder: Path, why: str) -> str:
    return f"{folder} cannot be loaded: config.json describes another model than its weights are of: {why}."
