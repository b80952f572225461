"""Whatever transformers raises about a model's folder, as an error of ours with a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from types import TracebackType
from typing import Any, TypeVar

from .faults import is_lost_device, is_out_of_memory
from .packages import is_needed

# What comes of a folder's broken files, somewhere in transformers.
_BROKEN = (
    *(ImportError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RuntimeError, SyntaxError),
)
# These have errors of no kind, and tokenizers raises Exception itself.
_PACKAGES = {"huggingface_hub", "jinja2", "pyo3_runtime", "safetensors", "tokenizers", "transformers"}
_LONGEST_WORDS = 600
# In place of the path of modules, to which ComfyUI adds that of this folder.
SHORT_NAME = "QwenVL"
Made = TypeVar("Made")


class LoadError(RuntimeError):
    """A model folder is there but cannot be loaded."""


class UnusableError(RuntimeError):
    """A model was loaded, but what its folder says fails when it is asked something."""


class NotFiniteError(UnusableError):
    """A model computes NaN or infinity where logits should be.

    Attributes:
        rows: of the batch, those in which it does, counted from 0.
        token: the first that cannot be chosen, counted from 0.
    """

    def __init__(self, rows: list[int], token: int) -> None:
        super().__init__(f"The model computes no numbers (NaN or infinity) for token {token + 1} of rows {rows}.")
        self.rows = rows
        self.token = token


class WrappedErrors:
    """A block in which transformers does what a folder says: whatever it raises becomes an error of ours.

    Memory that ran out and a device that failed are not the folder's fault and pass, as do a cancel and what is an
    error of ours already.

    Args:
        problem: the beginning of the message.
        kind: of the error.
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
    """ComfyUI shows of an error of these node classes QwenVL.LoadError, where it would show where this file lies."""
    for node in {base for each in nodes for base in each.__mro__ if getattr(each, "FUNCTION", "") in vars(base)}:
        setattr(node, node.FUNCTION, _with_short_names(vars(node)[node.FUNCTION]))


def _with_short_names(run: Callable[..., Made]) -> Callable[..., Made]:
    @wraps(run)
    def run_so(*given: Any, **named: Any) -> Made:
        with _ShortNames():
            return run(*given, **named)

    return run_so


class _ShortNames:
    """A block whose errors have short names from there on."""

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and _is_ours(kind):
            # Only what it is called changes: it is caught as before.
            kind.__module__ = SHORT_NAME
