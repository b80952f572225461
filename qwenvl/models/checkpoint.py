"""What a model folder says of itself in its JSON files, whatever its name."""

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

# What is read of a folder before it is used.
DESCRIPTIONS = ("config.json", "generation_config.json", INDEX)
# What its makers may recommend.
_SAMPLING = [setting.name for setting in SETTINGS.values() if setting.makers]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder by what is in it.

    Attributes:
        family: the config's model_type.
        has_vision: it reads pictures and videos.
        moe: only some experts of a layer work on each token.
        quantized: how the weights are stored, as transformers names it ("fp8", "awq", "gptq", "compressed-tensors",
            "bitsandbytes-4bit", ...); None where they are plain.
        sampling: the sampling parameters that its makers recommend, by the names of generation_config.json.
    """

    folder: Path
    family: str
    has_vision: bool = False
    moe: bool = False
    quantized: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what the folder says of itself in config.json and generation_config.json.

    Raises:
        UnreadableError: one of them is broken, or config.json is missing.
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
    """Why this transformers cannot load that family, and the command that mends it; None where it can."""
    needed = family_of(family).transformers
    if not needed or release(transformers_version) >= release(needed):
        return None
    return (
        f"A {family!r} model needs transformers {needed} or later, and {transformers_version} is installed: "
        "pip install -U transformers"
    )


def _has_vision(config: dict[str, Any], family: str) -> bool:
    """A finetune may have dropped the tower: its architecture then is the language model's alone."""
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
    """A section of a configuration; {} where there is none."""
    section = config.get(key)
    return section if isinstance(section, dict) else {}
