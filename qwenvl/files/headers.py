"""The names and headers of the files of a model's weights. The weights themselves are not read."""

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

# The files that transformers reads: one with all weights, or if it is missing, an index of several.
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# A number of bytes, weights or positions from here on is an error of the file.
_NO_COUNT = 1 << 48
# Most dimensions of a tensor.
_MOST_SIDES = 8
# One file of several: their common name, its number, and how many there are. A variant's name is before or after that.
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})((?:\.\w+)?\.safetensors)")

# Name of a tensor -> dtype, shape, data_offsets.
Tensors = dict[str, dict[str, Any]]


class RivalWeightsError(ValueError):
    """A folder with several sets of weights, of which none has the usual name."""


class BrokenWeightsError(ValueError):
    """A file of weights that is missing, cut short, or not a safetensors file."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that the folder's model consists of, including missing ones.

    As in transformers, model.safetensors comes before an index, which may be that of another copy. Without both, or
    with an index whose files are all missing, it is the only set of weights in the folder.

    Raises:
        UnreadableError, LookupError, TypeError, ValueError: the index is not valid, or leads out of the folder.
        RivalWeightsError: there are several sets.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    indexed = _indexed(folder)
    if any(file.is_file() for file in indexed):
        return indexed
    sets = _sets(folder)
    # The set with the usual name comes first: another is a variant, or has the layout of another program.
    usual = [name for name in sets if name == WHOLE] or list(sets)
    if len(usual) > 1:
        raise RivalWeightsError(
            f"it holds several sets of weights ({', '.join(sorted(usual)[:9])}), and none is called {WHOLE}: leave the "
            "one that is to be read"
        )
    return [folder / name for name in _parts(sets[usual[0]])] if usual else indexed


def has_own_index(folder: Path) -> bool:
    """Return True if transformers finds the weight files by itself."""
    if (folder / WHOLE).is_file():
        return True
    present = any(file.is_file() for file in _indexed(folder))
    # transformers fails for an index without this key.
    return present and "metadata" in _index(folder)


def headers(folder: Path) -> dict[Path, Tensors]:
    """Return the header of each file of a complete model. It is read once, until a file changes.

    Raises:
        BrokenWeightsError: a file is missing, cut short, or not a safetensors file.
        The errors of weight_files().
    """
    return _headers(tuple((path, _stamp(path)) for path in weight_files(folder)))


def weight_headers(folder: Path) -> Tensors:
    """Return name -> header (dtype, shape, data_offsets) of every tensor of a complete model; errors as headers()."""
    return {name: tensor for tensors in headers(folder).values() for name, tensor in tensors.items()}


def weight_map(folder: Path) -> dict[str, Path]:
    """Return name -> file of every tensor of a complete model; errors as headers()."""
    return {name: path for path, tensors in headers(folder).items() for name in tensors}


def tensors_of(header: bytes) -> Tensors:
    """Parse a safetensors header; ValueError, LookupError or TypeError if it is not valid."""
    tensors = bounded_json.parse(header, bounded_json.HEADER)
    tensors.pop("__metadata__", None)
    for name, tensor in tensors.items():
        start, end = tensor["data_offsets"]
        sides = tensor["shape"]
        # Checked before the product: one of numbers with thousands of digits takes for ever.
        counts = isinstance(sides, list) and len(sides) <= _MOST_SIDES and all(map(is_count, (start, end, *sides)))
        # A number takes at least half a byte.
        fits = counts and start <= end and math.prod(sides) <= 2 * (end - start)
        if not (fits and isinstance(tensor["dtype"], str)):
            raise ValueError(f"tensor {shown(name)} is not as long as its shape says")
    return tensors


def is_count(value: Any) -> TypeGuard[int]:
    """Return True if a value from a file is usable as a count: a whole number, not negative, and below _NO_COUNT."""
    return type(value) is int and 0 <= value < _NO_COUNT


def _indexed(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return []
    shards = sorted(set(_index(folder)["weight_map"].values()))
    if outside := [name for name in shards if not is_plain_name(name, windows=True)]:
        raise ValueError(f"{outside[0]!r} is not a plain file name")
    return [folder / name for name in shards]


def _sets(folder: Path) -> dict[str, str]:
    """Return the sets of weights in a folder: the name that a set would have as one file -> the name of one file."""
    sets = {}
    for file in sorted(folder.glob("*.safetensors")):
        shard = _SHARD.fullmatch(file.name)
        sets[shard[1].removesuffix(".safetensors") + shard[4] if shard else file.name] = file.name
    return sets


def _parts(name: str) -> list[str]:
    """Return the names of all files of the set that this file belongs to, including missing ones."""
    if not (shard := _SHARD.fullmatch(name)):
        return [name]
    stem, _, count, ending = shard.groups()
    return [f"{stem}-{number:05}-of-{count}{ending}" for number in range(1, int(count) + 1)]


def _stamp(path: Path) -> tuple[int, ...]:
    """Return a value that changes with the file; BrokenWeightsError if it is missing."""
    if not path.is_file():
        raise BrokenWeightsError(f"{path.name} is missing")
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


# Two, for two models that are asked in turn.
@lru_cache(maxsize=2)
def _headers(files: tuple[tuple[Path, tuple[int, ...]], ...]) -> dict[Path, Tensors]:
    return {path: _header(path) for path, _ in files}


def _header(path: Path) -> Tensors:
    """Read the header of a safetensors file. It says where the last tensor ends, by which a file cut short is found."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < size:
            raise BrokenWeightsError(f"{path.name} is cut short")
        if length > bounded_json.HEADER.size:
            raise BrokenWeightsError(f"{path.name} is not a safetensors file")
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
