"""Errors about a model's folder, and the conversion of whatever transformers raises into them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

from .faults import is_lost_device, is_out_of_memory
from .packages import is_needed

# What transformers may raise over broken files in a model's folder.
_BROKEN = (
    *(ImportError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, SyntaxError),
)
# These packages derive errors from Exception directly, and tokenizers raises Exception itself.
_PACKAGES = {"huggingface_hub", "jinja2", "pyo3_runtime", "safetensors", "tokenizers", "transformers"}
_LONGEST_WORDS = 600
# Shown in place of an error's module path, which in ComfyUI includes the path of this folder.
SHORT_NAME = "QwenVL"


class LoadError(RuntimeError):
    """A model folder exists but cannot be loaded."""


class UnusableError(RuntimeError):
    """A model was loaded, but its folder makes answering fail."""


class NotFiniteError(UnusableError):
    """A model computes NaN or infinity where logits should be.

    Attributes:
        rows: the rows of the batch with such logits, counted from 0.
        token: the first token that cannot be chosen, counted from 0.
    """

    def __init__(self, rows: list[int], token: int) -> None:
        super().__init__(f"The model computes no numbers (NaN or infinity) for token {token + 1} of rows {rows}.")
        self.rows = rows
        self.token = token


class WrappedErrors:
    """Context manager that turns what transformers raises over a model's folder into an error of this pack.

    Out of memory, a failed device, a cancel and this pack's own errors pass unchanged: they are not the folder's fault.

    Args:
        problem: the beginning of the message.
        kind: the class of the error.
    """

    def __init__(self, problem: str, kind: type[RuntimeError] = LoadError) -> None:
        self._problem = problem
        self._kind = kind

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not _is_of_a_folder(error):
            return
        words = " ".join(str(error).split())[:_LONGEST_WORDS] or type(error).__name__
        raise self._kind(f"{self._problem}: {words}") from error


def _is_of_a_folder(error: BaseException) -> bool:
    if isinstance(error, RuntimeError) and (is_out_of_memory(error) or is_lost_device(error)):
        return False
    if isinstance(error, ModuleNotFoundError) and is_needed(error):
        return False
    module = type(error).__module__
    if _is_ours(type(error)):
        return False
    return isinstance(error, _BROKEN) or type(error) is Exception or module.partition(".")[0] in _PACKAGES


def _is_ours(kind: type[BaseException]) -> bool:
    return kind.__module__ == SHORT_NAME or kind.__module__.startswith(f"{__package__}.")


def name_errors_shortly(nodes: Iterable[Any]) -> None:
    """Have ComfyUI show errors of these node classes as QwenVL.LoadError instead of with this file's path."""
    for node in nodes:
        setattr(node, node.FUNCTION, _ShortNames()(getattr(node, node.FUNCTION)))


class _ShortNames(ContextDecorator):
    """Decorator that gives this pack's errors their short name as they leave the function."""

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and _is_ours(kind):
            # Only the displayed name changes: except clauses catch the error as before.
            kind.__module__ = SHORT_NAME
