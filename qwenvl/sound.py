"""Whether a model folder is sound: its description held against its weights, and whatever is wrong as one error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .checkpoint import part, read_object
from .download import weight_headers
from .faults import is_out_of_memory

# What comes of a folder's broken files, somewhere in transformers.
_BROKEN = (
    *(ImportError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, SyntaxError),
)
# These have errors of no kind, and tokenizers raises Exception itself.
_PACKAGES = {"huggingface_hub", "jinja2", "pyo3_runtime", "safetensors", "tokenizers", "transformers"}
# Numbers of a model for each byte on disk: two where they have four bits each, and as much again to be safe.
_MOST_PER_BYTE = 8
_LAYERS = ("num_hidden_layers", "depth", "num_experts", "num_local_experts")
_LONGEST_WORDS = 600


class LoadError(RuntimeError):
    """A model folder is there but cannot be loaded."""


class Understood:
    """A block in which transformers reads a folder: whatever it raises about it becomes a LoadError.

    Memory that ran out is not the folder's fault and passes, as does a cancel.

    Args:
        problem: the beginning of the message.
    """

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, LoadError) or not _is_of_a_folder(error):
            return
        words = " ".join(str(error).split())[:_LONGEST_WORDS] or type(error).__name__
        raise LoadError(f"{self._problem}: {words}") from error


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
    config = read_object(folder / "config.json")
    for section in (config, part(config, "text_config"), part(config, "vision_config")):
        if claimed := [name for name, value in section.items() if _amount(name, value) > most]:
            raise LoadError(_unlike(folder, f"{claimed[0]} is more than they can hold"))
    with torch.device("meta"):
        model = build()
    count = sum(each.numel() for each in (*model.parameters(), *model.buffers()))
    stored = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors)
    if count > _MOST_PER_BYTE * stored:
        raise LoadError(_unlike(folder, f"it has {count:.1e} numbers, and they have {stored:.1e} bytes"))


def _amount(name: str, value: Any) -> int:
    """How many parts of a model a setting asks for."""
    if isinstance(value, list):
        return len(value)
    return value if name in _LAYERS and isinstance(value, int) else 0


def _unlike(folder: Path, why: str) -> str:
    return f"{folder} cannot be loaded: config.json describes another model than its weights are of: {why}."


def _is_of_a_folder(error: BaseException) -> bool:
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return False
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, _BROKEN) or type(error) is Exception or package in _PACKAGES
