"""Reads from a model folder's JSON files what kind of model it holds. The folder's name does not count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.bounded_json import UnreadableError, read_json_object
from ..files.headers import INDEX
from ..packages import release
from ..settings import SETTINGS
from .families import family_of

# The files that are read before a folder is used.
DESCRIPTIONS = ("config.json", "generation_config.json", INDEX)
# The sampling parameters that a model's makers may recommend.
_SAMPLING = [setting.name for setting in SETTINGS.values() if setting.makers]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of the model in a folder.

    Attributes:
        family: the config's model_type.
        has_vision: the model reads pictures and videos.
        moe: it is a mixture of experts: only some experts of a layer work on each token.
        quantized: how the weights are stored, as transformers names it ("fp8", "awq", "gptq", "compressed-tensors",
            "bitsandbytes-4bit", ...); None if they are not quantized.
        sampling: the sampling parameters that its makers recommend, by their names in generation_config.json.
    """

    folder: Path
    family: str
    has_vision: bool = False
    moe: bool = False
    quantized: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder's config.json and generation_config.json.

    Raises:
        UnreadableError: a file is broken, or config.json is missing.
    """
    config = read_json_object(folder / "config.json")
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise UnreadableError(folder / "config.json", "it names no model_type, so this is no transformers model")
    text = part(config, "text_config") or config
    return Checkpoint(
        folder=folder,
        family=family,
        has_vision=_has_vision(config, family),
        moe=bool(text.get("num_experts") or text.get("num_local_experts")),
        quantized=_quantized(config) or _quantized(text),
        sampling=_sampling(folder),
    )


def why_too_old(family: str, transformers_version: str) -> str | None:
    """Explain why this transformers cannot load that family, with the command to upgrade; None if it can."""
    needed = family_of(family).transformers
    if not needed or release(transformers_version) >= release(needed):
        return None
    return (
        f"A {family!r} model needs transformers {needed} or later, and {transformers_version} is installed: "
        "pip install -U transformers"
    )


def _has_vision(config: dict[str, Any], family: str) -> bool:
    """Tell if the model has a vision tower. A finetune may have dropped it; then its class is the language model's."""
    names = config.get("architectures")
    text_only = isinstance(names, list) and bool(names) and all(str(name).endswith("ForCausalLM") for name in names)
    return family_of(family).has_vision and bool(part(config, "vision_config")) and not text_only


def _quantized(config: dict[str, Any]) -> str | None:
    settings = part(config, "quantization_config") or part(config, "compression_config")
    method = settings.get("quant_method")
    if method in (None, "bitsandbytes"):
        bits = [bits for bits in ("4bit", "8bit") if settings.get(f"load_in_{bits}")]
        return f"bitsandbytes-{bits[0]}" if bits else method
    return str(method)


def _sampling(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    settings = read_json_object(path) if path.is_file() else {}
    return {name: settings[name] for name in _SAMPLING if isinstance(settings.get(name), int | float)}


def part(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section of a configuration; {} if it is missing."""
    section = config.get(key)
    return section if isinstance(section, dict) else {}
