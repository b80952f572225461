"""Whatever transformers raises about a model's folder, as an error of ours with a sentence."""

from __future__ import annotations

from types import TracebackType

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
    if module.startswith(f"{__package__}."):
        return False
    return isinstance(error, _BROKEN) or type(error) is Exception or module.partition(".")[0] in _PACKAGES
