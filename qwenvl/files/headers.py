"""The files of a model's weights by their names and headers. Nothing of the weights themselves is read."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from ..checks import shown
from ..paths import is_plain_name
from . import bounded_json
from .bounded_json import read_json_object

# What transformers reads: one file, or where that is not there, an index of several.
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# No number of bytes, weights or positions of a model is as large.
_NO_COUNT = 1 << 48
# Of a tensor.
_MOST_SIDES = 8
# A part of several: what all of them are called, and how many there are. A variant is named before or behind that.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})((?:\.\w+)?\.safetensors)")

# Name of a tensor -> dtype, shape, data_offsets.
Tensors = dict[str, dict[str, Any]]


class RivalWeightsError(ValueError):
    """A folder with several sets of weights, of which none is the one that is meant."""


class BrokenWeightsError(ValueError):
    """A file of weights that is missing, cut short, or none."""


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
    return there and "metadata" in _index(folder)


def headers(folder: Path) -> dict[Path, Tensors]:
    """What each file of a whole model says of its tensors. Read once, until a file changes.

    Raises:
        BrokenWeightsError: a file is missing, cut short, or none.
        whatever weight_files raises.
    """
    return _headers(tuple((path, _stamp(path)) for path in weight_files(folder)))


def weight_headers(folder: Path) -> Tensors:
    """Name and header (dtype, shape, data_offsets) of every tensor of a whole model."""
    return {name: tensor for tensors in headers(folder).values() for name, tensor in tensors.items()}


def weight_map(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a whole model."""
    return {name: path for path, tensors in headers(folder).items() for name in tensors}


def tensors_of(header: bytes) -> Tensors:
    """Name -> what a safetensors header says of a tensor; ValueError, LookupError or TypeError where it is none."""
    tensors = bounded_json.parse(header, bounded_json.HEADER)
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


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a file may be computed with as a number of anything: whole, not negative, of a sane size."""
    return type(value) is int and 0 <= value < _NO_COUNT


def _indexed(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return []
    shards = sorted(set(_index(folder)["weight_map"].values()))
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


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file does."""
    if not path.is_file():
        raise BrokenWeightsError(f"{path.name} is missing")
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


# Of two models that are asked in turn.
@lru_cache(maxsize=2)
def _headers(files: tuple[tuple[Path, tuple[int, ...]], ...]) -> dict[Path, Tensors]:
    return {path: _header(path) for path, _ in files}


def _header(path: Path) -> Tensors:
    """A safetensors file states where its last tensor ends, so a cut file shows without reading the weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < size:
            raise BrokenWeightsError(f"{path.name} is cut short")
        if length > bounded_json.HEADER.size:
            raise BrokenWeightsError(f"{path.name} is no safetensors file")
        tensors = tensors_of(file.read(length))
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if size != expected:
        raise BrokenWeightsError(f"{path.name} has {size} bytes instead of {expected}")
    return tensors


def _index(folder: Path) -> dict[str, Any]:
    return _read_index(folder / INDEX, _stamp(folder / INDEX))


@lru_cache(maxsize=2)
def _read_index(path: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    return read_json_object(path)
