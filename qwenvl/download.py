"""One model folder, complete or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .log import log

# Weights as safetensors only, and what the tokenizer and the processor read. Never pickles, never code.
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.model")
# Exists while a download is under way, so that a folder cut off between two files is never taken for whole.
UNFINISHED = ".download-unfinished"


class DownloadError(RuntimeError):
    """A model could not be fetched."""


def why_incomplete(folder: Path) -> str | None:
    """The reason why the folder is not a whole model, or None if it is one. Reads headers only."""
    if (folder / UNFINISHED).exists():
        return "its download has not finished"
    return _why_not_whole(folder)


def weight_headers(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and header (dtype, shape, data_offsets) of every tensor of a whole model."""
    for path in _weight_files(folder):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from ((name, tensor) for name, tensor in header.items() if name != "__metadata__")


def fetch(repo_id: str, folder: Path) -> None:
    """Download a repository into the folder; what an earlier try left there is resumed.

    Raises:
        DownloadError: nothing could be fetched, or what came is not a whole model.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    log.info("downloading %s to %s", repo_id, folder)
    marker = folder / UNFINISHED
    # Of whichever HTTP library this version of huggingface_hub uses: a lost connection is not wrapped.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        # Asked first, because snapshot_download calls a folder that exists a success when the hub cannot be reached.
        revision = HfApi().model_info(repo_id).sha
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=list(WANTED))
    except (http_error, OSError, ValueError) as error:
        raise DownloadError(
            f"{repo_id} could not be downloaded: {_first_line(error)} "
            f"Check the connection, or put the model's files into {folder} yourself."
        ) from error
    if reason := _why_not_whole(folder):
        raise DownloadError(f"{repo_id} was fetched to {folder}, but {reason}, so it cannot be loaded.")
    marker.unlink()


def _why_not_whole(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return "the tokenizer is missing"
    try:
        weights = _weight_files(folder)
        if not weights:
            return "it holds no .safetensors weights"
        return next((reason for reason in map(_why_broken, weights) if reason), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its index or a weight file cannot be read ({_first_line(error)})"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if outside := [name for name in shards if Path(name).name != name]:
        raise ValueError(f"{outside[0]!r} is no plain file name")
    return [folder / name for name in shards]


def _why_broken(path: Path) -> str | None:
    """A safetensors file states where its last tensor ends, so a cut file shows without reading the weights."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if not 0 < header_size < size:
            return f"{path.name} is cut short"
        header = json.loads(file.read(header_size))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    expected = 8 + header_size + max(ends, default=0)
    return None if size == expected else f"{path.name} has {size} bytes instead of {expected}"


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else f"{line}."
