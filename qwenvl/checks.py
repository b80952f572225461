"""What a setting may hold: a link in a workflow may bring anything, and so may a file. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

# Of a value in a message; it may be a megabyte of text.
_LONGEST_SHOWN = 200
# What a terminal takes for orders, what turns the order of the others around, and what cannot be written.
_ORDERS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


class InvalidSettingError(ValueError):
    """A setting has a value that it cannot have."""


def shown(value: object) -> str:
    """A value as a message repeats it: the beginning of a long one. Pure."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list that holds itself
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ..."


def printable(text: str, keep: str = "\n\t") -> str:
    """The text as it may be written to a terminal or a log: names of files and models may hold orders. Pure.

    Args:
        keep: control characters that stay as they are.
    """
    with suppress(UnicodeEncodeError):  # half a character, which is escaped
        # A name that Python read as bytes, where the locale knows no other letters.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return _ORDERS.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def in_range(name: str, value: object, low: float, high: float) -> None:
    """Raise InvalidSettingError where a number is outside of its range; one of whole numbers holds whole numbers."""
    whole = isinstance(low, int)
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    # Written so that NaN, which compares as false, is refused too.
    if not (fits and low <= value <= high):  # type: ignore[operator]
        kind = "a whole number between" if whole else "between"
        raise InvalidSettingError(f"{name} must be {kind} {low} and {high}, got {shown(value)}.")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise InvalidSettingError where the value is none of those."""
    if not (isinstance(value, str) and value in allowed):
        raise InvalidSettingError(f"{name} {shown(value)} does not exist. Pick one of: {', '.join(allowed)}.")


def checked(declared: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a node was handed, each of the kind that its input declares.

    ComfyUI converts what a widget holds, but hands on whatever a link brings.

    Args:
        declared: input -> (kind, options), as in INPUT_TYPES.

    Raises:
        InvalidSettingError: a value is of another kind; it names the input.
    """
    kinds = {name: kind for name, (kind, _) in declared.items()}
    return {name: _of_kind(name, kinds.get(name), value) for name, value in given.items()}


def require_text(name: str, value: object) -> str:
    """The value, which must be a text, as it is: a path with half a character is another path with a whole one."""
    if not isinstance(value, str):
        raise InvalidSettingError(f"{name} must be a text, got {shown(value)}.")
    return value


def text_of(name: str, value: object) -> str:
    """The value, which must be a text, in whole characters."""
    return whole_characters(require_text(name, value))


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a character that stands alone. Pure.

    JSON can hold halves, where somebody cut a text in the middle of an emoji, and nothing can write them.
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
    # A whole number stays one, so that a message repeats what was given.
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        raise TypeError
    return float(value)


def _images(value: Any) -> Any:
    """A tensor or a list of them: a text would be taken for the path of a file."""
    if not all(hasattr(each, "ndim") for each in (value if isinstance(value, list) else [value])):
        raise TypeError
    return value


_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "STRING": ("a text", _text),
    "BOOLEAN": ("true or false", _switch),
    "INT": ("a whole number", _whole),
    "FLOAT": ("a number", _number),
    "IMAGE": ("an image", _images),
}
