"""What a model folder says of itself in its JSON files, whatever its name. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .settings import SETTINGS

# Family (the config's model_type) -> the first transformers that knows it.
SUPPORTED: dict[str, str] = {
    "qwen2": "4.37",
    "qwen2_moe": "4.40",
    "qwen2_vl": "4.45",
    "qwen2_5_vl": "4.49",
    "qwen3": "4.51",
    "qwen3_moe": "4.51",
    "qwen3_next": "4.57",
    "qwen3_vl": "4.57",
    "qwen3_vl_moe": "4.57",
    "qwen3_5": "5.2",
    "qwen3_5_text": "5.2",
    "qwen3_5_moe": "5.2",
    "qwen3_5_moe_text": "5.2",
    "qwen4_exp": "5.16",
    "qwen4_exp_text": "5.16",
}
# Those whose class has a vision tower.
_SEEING = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"}
# Carries multi-token prediction heads that its config does not mention.
_SILENT_MTP = {"qwen3_next"}
# What its makers may recommend.
_SAMPLING = [setting.name for setting in SETTINGS.values() if setting.makers]

# The index of a model of a terabyte has 5 MB.
_LARGEST = 64 << 20


class CheckpointError(ValueError):
    """A model folder whose own description cannot be read."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder by what is in it.

    Attributes:
        family: the config's model_type.
        sees: it reads pictures and videos.
        moe: only some experts of a layer work on each token.
        thinks: its chat template opens, or offers to open, a <think> block before the answer.
        thinking_switch: enable_thinking turns that on and off.
        mtp: heads that predict several tokens at once are among the weights.
        quantized: how the weights are stored, as transformers names it ("fp8", "awq", "gptq", "compressed-tensors",
            "bitsandbytes-4bit", ...); None where they are plain.
        dtype: the precision of its plain weights, as "bfloat16"; "" where it does not say.
        sampling: the sampling parameters that its makers recommend, by the names of generation_config.json.
    """

    folder: Path
    family: str
    sees: bool = False
    moe: bool = False
    thinks: bool = False
    thinking_switch: bool = False
    mtp: bool = False
    quantized: str | None = None
    dtype: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what the folder says of itself: a few small files, and the weights' index where that is needed.

    Raises:
        CheckpointError: config.json is missing or broken, or another of its files is no JSON object.
    """
    config = read_object(folder / "config.json")
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise CheckpointError(f"{folder / 'config.json'} names no model_type, so this is no transformers model.")
    text = part(config, "text_config") or config
    opening = _template(folder).rpartition("add_generation_prompt")[2]
    return Checkpoint(
        folder=folder,
        family=family,
        sees=_sees(config, family),
        moe=bool(text.get("num_experts") or text.get("num_local_experts")),
        thinks="<think>" in opening,
        thinking_switch="<think>" in opening and "enable_thinking" in opening,
        mtp=_has_mtp(folder, family, text),
        quantized=_quantized(config) or _quantized(text),
        dtype=_dtype(config) or _dtype(text),
        sampling=_sampling(folder),
    )


def why_too_old(family: str, transformers_version: str) -> str | None:
    """Why this transformers cannot load that family, and the command that mends it; None where it can."""
    needed = SUPPORTED.get(family)
    if needed is None or _numbers(transformers_version) >= _numbers(needed):
        return None
    return (
        f"A {family!r} model needs transformers {needed} or later, and {transformers_version} is installed: "
        "pip install -U transformers"
    )


def _sees(config: dict[str, Any], family: str) -> bool:
    """A finetune may have dropped the tower: its architecture then is the language model's alone."""
    names = config.get("architectures")
    text_only = isinstance(names, list) and bool(names) and all(str(name).endswith("ForCausalLM") for name in names)
    return family in _SEEING and bool(part(config, "vision_config")) and not text_only


def _has_mtp(folder: Path, family: str, text: dict[str, Any]) -> bool:
    """Looked up in the index where the config claims heads: finetunes and quantized copies often come without."""
    if not text.get("mtp_num_hidden_layers") and family not in _SILENT_MTP:
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return family not in _SILENT_MTP
    return any(re.match(r"(model\.)?mtp\.", name) for name in part(read_object(index), "weight_map"))


def _quantized(config: dict[str, Any]) -> str | None:
    settings = part(config, "quantization_config") or part(config, "compression_config")
    method = settings.get("quant_method")
    if method in (None, "bitsandbytes"):
        bits = [bits for bits in ("4bit", "8bit") if settings.get(f"load_in_{bits}")]
        return f"bitsandbytes-{bits[0]}" if bits else method
    return str(method)


def _dtype(config: dict[str, Any]) -> str:
    """transformers 4 writes torch_dtype."""
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _sampling(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    settings = read_object(path) if path.is_file() else {}
    return {name: settings[name] for name in _SAMPLING if isinstance(settings.get(name), int | float)}


def _template(folder: Path) -> str:
    """The chat template, from whichever of its four places has it; "" without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _text(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        template = read_object(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
            template = next(named, {}).get("template")
        if isinstance(template, str):
            return template
    return ""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a model folder's file, or CheckpointError."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read: it must hold a JSON object.")
    return content


def _text(path: Path) -> str:
    try:
        # Opening what is no file may wait for ever.
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise OSError(f"it is larger than {_LARGEST:,} bytes")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise CheckpointError(f"{path} cannot be read: {reason}.") from error


def part(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A section of a configuration; {} where there is none."""
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _numbers(version: str) -> tuple[int, ...]:
    """(5, 2) of "5.2.0.dev0": the patch level and what follows do not matter here."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
