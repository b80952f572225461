"""What a model folder says of itself in its JSON files, whatever its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ..checks import shown
from ..packages import release
from ..paths import is_plain_name
from ..settings import SETTINGS
from .families import family_of

# What its makers may recommend.
_SAMPLING = [setting.name for setting in SETTINGS.values() if setting.makers]
# The index of a model of a terabyte has 5 MB.
LARGEST = 64 << 20
# No number of bytes, weights or positions of a model is as large.
_NO_COUNT = 1 << 48
# Of a tensor.
_MOST_SIDES = 8
# What transformers reads: one file, or where that is not there, an index of several.
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is read of a folder before it is used.
DESCRIPTIONS = ("config.json", "generation_config.json", INDEX)
# A part of several: what all of them are called, and how many there are. A variant is named before or behind that.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})((?:\.\w+)?\.safetensors)")


class UnreadableError(ValueError):
    """A file that does not hold what it should; reason says why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read: {reason}.")
        self.reason = reason


class RivalWeightsError(ValueError):
    """A folder with several sets of weights, of which none is the one that is meant."""


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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the folder's model, whether they are there or not.

    As transformers has it, model.safetensors comes before an index, which may be that of another copy. Of what has
    neither, or an index of files that are all gone, it is the only set of weights there.

    Raises:
        UnreadableError, LookupError, TypeError, ValueError: an index that is none, or that leads out of the folder.
        RivalWeightsError: there are several sets.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    indexed = _indexed(folder)
    if any(file.is_file() for file in indexed):
        return indexed
    sets = _sets(folder)
    # Those that are called as usual: another set is a variant, or in the layout of another program.
    usual = [name for name in sets if name == WHOLE] or list(sets)
    if len(usual) > 1:
        raise RivalWeightsError(
            f"it holds several sets of weights ({', '.join(sorted(usual)[:9])}), and none is called {WHOLE}: leave the "
            "one that is to be read"
        )
    return [folder / name for name in _parts(sets[usual[0]])] if usual else indexed


def has_own_index(folder: Path) -> bool:
    """Whether transformers finds the weight files by itself."""
    if (folder / WHOLE).is_file():
        return True
    there = any(file.is_file() for file in _indexed(folder))
    # Which it wants to find in every index.
    return there and "metadata" in read_json_object(folder / INDEX)


def _indexed(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return []
    shards = sorted(set(read_json_object(folder / INDEX)["weight_map"].values()))
    if outside := [name for name in shards if not is_plain_name(name, windows=True)]:
        raise ValueError(f"{outside[0]!r} is no plain file name")
    return [folder / name for name in shards]


def _sets(folder: Path) -> dict[str, str]:
    """What each set of weights there would be called as one file -> the name of one of its files."""
    sets = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = _SHARD.fullmatch(file.name)
        sets[shard[1].removesuffix(".safetensors") + shard[4] if shard else file.name] = file.name
    return sets


def _parts(name: str) -> list[str]:
    """The names of all files of the set that this one is of, those that are missing too."""
    if not (shard := _SHARD.fullmatch(name)):
        return [name]
    stem, _, count, ending = shard.groups()
    return [f"{stem}-{number:05}-of-{count}{ending}" for number in range(1, int(count) + 1)]


def tensors_of(header: bytes) -> dict[str, dict[str, Any]]:
    """Name -> what a safetensors header says of a tensor; ValueError, LookupError or TypeError where it is none."""
    tensors = json.loads(header)
    tensors.pop("__metadata__", None)
    for name, tensor in tensors.items():
        start, end = tensor["data_offsets"]
        sides = tensor["shape"]
        # Before anything is computed: a product of numbers of thousands of digits takes for ever.
        counts = isinstance(sides, list) and len(sides) <= _MOST_SIDES and all(map(is_count, (start, end, *sides)))
        # A number takes half a byte at least.
        fits = counts and start <= end and math.prod(sides) <= 2 * (end - start)
        if not (fits and isinstance(tensor["dtype"], str)):
            raise ValueError(f"tensor {shown(name)} is not as long as its shape says")
    return tensors


def part(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A section of a configuration; {} where there is none."""
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a file may be computed with as a number of anything: whole, not negative, of a sane size."""
    return type(value) is int and 0 <= value < _NO_COUNT


def read_json_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        largest: bytes of a file that is still read.

    Raises:
        UnreadableError: there is no such file, it is too large or no text, or it holds anything but one JSON object.
    """
    try:
        content = json.loads(_text(path, largest))
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, nested too deep
        raise UnreadableError(path, str(error)) from error
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UnreadableError(path, reason) from error
    if not isinstance(content, dict):
        raise UnreadableError(path, "it must hold a JSON object")
    return content


def _text(path: Path, largest: int) -> str:
    # Opening what is no file may wait for ever.
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(f"it is larger than {largest:,} bytes")
    return content.decode()
