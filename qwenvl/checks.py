"""Checks of values from outside: links in workflows and files may deliver anything. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

# Characters of a value in a message; the value may be a megabyte of text.
_LONGEST_SHOWN = 200
# Control characters that a terminal obeys, marks that change the direction of text, and lone surrogates.
_ORDERS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


class InvalidSettingError(ValueError):
    """A setting has a value that it cannot have."""


def shown(value: object) -> str:
    """Format a value for a message, cut to _LONGEST_SHOWN characters. Pure."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list that holds itself
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ..."


def printable(text: str, keep: str = "\n\t") -> str:
    """Escape control characters for a terminal or a log: names of files and models may hold some. Pure.

    Args:
        keep: control characters that stay as they are.
    """
    with suppress(UnicodeEncodeError):  # a lone surrogate, which is escaped below
        # Decode file names that Python holds as raw bytes because the locale could not decode them.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return _ORDERS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def in_range(name: str, value: object, low: float, high: float) -> None:
    """Raise InvalidSettingError unless low <= value <= high; the value must be whole if low is an int."""
    whole = isinstance(low, int)
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    # Written so that NaN, which compares as false, is refused too.
    if not (fits and low <= value <= high):  # type: ignore[operator]
        kind = "a whole number between" if whole else "between"
        raise InvalidSettingError(f"{name} must be {kind} {low} and {high}, got {shown(value)}.")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise InvalidSettingError unless the value is one of the allowed texts."""
    if not (isinstance(value, str) and value in allowed):
        raise InvalidSettingError(f"{name} {shown(value)} does not exist. Pick one of: {', '.join(allowed)}.")


def checked(declared: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the values that a node was given to the kinds that its inputs declare.

    ComfyUI converts the values of widgets, but passes on anything that a link delivers.

    Args:
        declared: input -> (kind, options), as in INPUT_TYPES.

    Raises:
        InvalidSettingError: a value is of another kind; the message names the input.
    """
    kinds = {name: kind for name, (kind, _) in declared.items()}
    return {name: _of_kind(name, kinds.get(name), value) for name, value in given.items()}


def require_text(name: str, value: object) -> str:
    """Return the value unchanged, or raise InvalidSettingError if it is not a text.

    For paths: replacing a lone surrogate in one would name another file.
    """
    if not isinstance(value, str):
        raise InvalidSettingError(f"{name} must be a text, got {shown(value)}.")
    return value


def text_of(name: str, value: object) -> str:
    """Return the value with lone surrogates replaced, or raise InvalidSettingError if it is not a text."""
    return whole_characters(require_text(name, value))


def whole_characters(text: str) -> str:
    """Replace each lone surrogate in the text with U+FFFD. Pure.

    JSON can hold them, for example where a text was cut in the middle of an emoji, and they cannot be encoded.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _of_kind(name: str, kind: Any, value: Any) -> Any:
    kind = "STRING" if isinstance(kind, list) else kind
    if kind not in _KINDS or (kind == "IMAGE" and value is None):
        return value
    wanted, convert = _KINDS[kind]
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidSettingError(f"{name} must be {wanted}, got {shown(value)}.") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _switch(value: Any) -> bool:
    if not isinstance(value, Integral):
        raise TypeError
    return bool(value)


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise TypeError
    return int(number)


def _number(value: Any) -> float:
    # Keep an int an int, so that a message shows the value as it was given.
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        raise TypeError
    return float(value)


def _images(value: Any) -> Any:
    """Check that the value is a tensor or a list of tensors: a text would be taken for the path of a file."""
    if not all(hasattr(picture, "ndim") for picture in (value if isinstance(value, list) else [value])):
        raise TypeError
    return value


_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "STRING": ("a text", _text),
    "BOOLEAN": ("true or false", _switch),
    "INT": ("a whole number", _whole),
    "FLOAT": ("a number", _number),
    "IMAGE": ("an image", _images),
}
