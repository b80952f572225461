from pathlib import Path

import pytest
import torch

from qwenvl import errors
from qwenvl.errors import LoadError, UnusableError, WrappedErrors, name_errors_shortly
from qwenvl.files.bounded_json import UnreadableError


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), Exception("of tokenizers"), RuntimeError("odd")])
def test_what_transformers_raises_about_a_folder_is_a_load_error(error):
    with pytest.raises(LoadError, match=r"^m cannot be read: .+") as caught, WrappedErrors("m cannot be read"):
        raise error
    assert caught.value.__cause__ is error


def test_the_error_is_of_the_kind_that_was_asked_for():
    with (
        pytest.raises(UnusableError, match=r"^m cannot be asked: x$"),
        WrappedErrors("m cannot be asked", UnusableError),
    ):
        raise ValueError("x")


class Cancel(Exception):  # noqa: N818
    """As ComfyUI's own, an Exception of no kind of ours."""


@pytest.mark.parametrize(
    "error",
    [
        *(Cancel(), KeyboardInterrupt(), LoadError("m holds nothing"), UnreadableError(Path("x"), "no")),
        *(MemoryError(), torch.cuda.OutOfMemoryError("x"), RuntimeError("CUDA error: unspecified launch failure")),
    ],
)
def test_what_is_not_the_folder_s_fault_passes(error):
    with pytest.raises(type(error)) as caught, WrappedErrors("m cannot be read"):
        raise error
    assert caught.value is error


def test_an_error_that_leaves_a_node_has_a_short_name_and_is_caught_as_before(monkeypatch):
    class Node:
        FUNCTION = "answer"

        def answer(self, error):
            """Answers."""
            raise error

    class Older(Node):
        """Inherits the function."""

    class OddError(LoadError):
        """A new one, whose name no other test may find changed."""

    monkeypatch.setattr(OddError, "__module__", f"{errors.__package__}.loading")
    name_errors_shortly([Node, Older])
    with pytest.raises(LoadError, match="odd"):
        Older().answer(OddError("odd"))
    assert OddError.__module__ == "QwenVL"
    assert Node.answer.__doc__ == "Answers."
    with pytest.raises(OddError), WrappedErrors("m cannot be read"):
        raise OddError("it is still ours")
    with pytest.raises(KeyError):
        Node().answer(KeyError("x"))
    assert KeyError.__module__ == "builtins"
