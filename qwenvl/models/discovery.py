"""Finds the models that are already on this machine. Standard library only.

ComfyUI asks for the list often, so little is read, and nothing twice.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.bounded_json import UnreadableError
from ..files.headers import weight_files
from ..log import log
from .builtin import Model, Size
from .checkpoint import DESCRIPTIONS, read_checkpoint
from .download import UNFINISHED, why_incomplete
from .families import FAMILIES
from .trust import links_out


def discovered(roots: Sequence[Path]) -> Iterator[tuple[Model, bool]]:
    """Yield every model of a supported family below the roots and in Hugging Face's cache, and if it reads pictures.

    A folder counts if it has a config, a tokenizer and safetensors weights; it is checked completely when it is used.
    In a root it may be <name>, <owner>--<name>, or one folder deeper.
    """
    for name, repo_id, folder in [*_in_roots(roots), *_in_hub_cache()]:
        known = describe(folder)
        if known:
            # With its repository known, the model is looked for everywhere when used, and can be downloaded again.
            yield Model(name, repo_id, None if repo_id else folder, Size(known.bytes_on_disk)), known.has_vision


@dataclass(frozen=True, slots=True)
class Description:
    """What the list needs to know about a folder."""

    has_vision: bool
    bytes_on_disk: int


def describe(folder: Path) -> Description | None:
    """Describe the folder; None if it holds no supported model. It is read again when a file in it comes or goes."""
    try:
        changed = folder.stat().st_mtime_ns, (folder / "config.json").stat().st_mtime_ns
    except OSError:
        return None
    return _describe(folder, changed)


def hub_cache() -> Path:
    """Return huggingface_hub's cache folder by its environment variables, without importing the library."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(cache)).expanduser()


def in_hub_cache(repo_id: str) -> list[Path]:
    """List a repository's snapshots: first that of its main branch when last fetched, then the others, newest first.

    The first need not hold the weights: a program that fetches the tokenizer alone may have made it.
    """
    repository = hub_cache() / f"models--{repo_id.replace('/', '--')}"
    snapshots = _folders(repository / "snapshots")
    try:
        named = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = repository
    return sorted(snapshots, key=lambda snapshot: (snapshot == named, snapshot.stat().st_mtime), reverse=True)


def _in_roots(roots: Sequence[Path]) -> Iterator[tuple[str, str, Path]]:
    """Yield name, repository ("" unless the folder's name tells it) and folder of each possible model."""
    for root in roots:
        for folder in _folders(root):
            if _has_config(folder):
                owner, separator, last = folder.name.partition("--")
                yield (f"{owner}/{last}", f"{owner}/{last}", folder) if separator else (folder.name, "", folder)
                continue
            for deeper in _folders(folder):
                yield f"{folder.name}/{deeper.name}", "", deeper


def _has_config(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file()
    except OSError:  # a folder that may be listed but not entered
        return False


def _in_hub_cache() -> Iterator[tuple[str, str, Path]]:
    for folder in _folders(hub_cache()):
        kind, *rest = folder.name.split("--")
        if kind == "models" and len(rest) == 2:
            repo_id = "/".join(rest)
            if snapshot := next(filter(describe, in_hub_cache(repo_id)), None):
                yield repo_id, repo_id, snapshot


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            return sorted(Path(entry) for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return []


@functools.lru_cache(maxsize=4096)
def _describe(folder: Path, changed: tuple[int, int]) -> Description | None:
    try:
        names = {entry.name for entry in folder.iterdir()}
        weights = [folder / name for name in names if name.endswith(".safetensors")]
        if not weights and any(name.endswith(".bin") for name in names):
            log.info("not in the list of models: %s: %s", folder, why_incomplete(folder))
        if UNFINISHED in names or not weights or not names & {"tokenizer.json", "vocab.json"}:
            return None
        linked = links_out(folder)
        if elsewhere := next((linked[name] for name in DESCRIPTIONS if name in linked), None):
            log.info("not in the list of models: in %s, %s", folder, elsewhere)
            return None
        checkpoint = read_checkpoint(folder)
        size = sum(file.stat().st_size for file in _read_of(folder, weights) if file.exists())
    except (UnreadableError, OSError) as error:
        log.info("not in the list of models: %s", error)
        return None
    return Description(checkpoint.has_vision, size) if checkpoint.family in FAMILIES else None


def _read_of(folder: Path, weights: list[Path]) -> list[Path]:
    """Return the weight files that would be read; all if the index is broken, which is reported when it is used."""
    try:
        return weight_files(folder)
    except (ValueError, LookupError, TypeError, AttributeError):
        return weights
