"""The limits of rendering a chat template: lines of Python, time, and the size of all values that it makes.

Lines of Python are counted, and a cancel is checked for on the way. The work of C code called by one line is bounded by
the size of its arguments and result, which are checked wherever a template can make a value.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import TemplateRuntimeError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context

# Lines of Python between two checks of the time and for a cancel.
_LOOK_EVERY = 128
# Most seconds. Real templates take milliseconds.
_LONGEST_S = 20.0
# Largest size of all values together, as weight() counts it.
_MOST_MADE = 1 << 26
# Largest size of one value in characters; a container or number counts as _VALUE characters.
LARGEST = 1 << 22
_VALUE = 16
# Most bits of whole numbers that are computed with.
_MOST_BITS = 4096
# Most comparisons of a search that looks for every character of one text in another.
_LONGEST_SEARCH = LARGEST * 32
# Most characters of a format string.
_LONGEST_FORM = 10_000
# Most digits of a number that is read or rounded, and the depth of JSON.
_WIDEST = 1000
# In a format string: a width of thousands, or one that comes from an argument.
_WIDE = re.compile(r"\d{4,}|\*|:[^{}:]*\{")

# Methods of plain values that a template may call: those that templates use, and no others.
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            *("capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha"),
            *("isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join"),
            *("ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex"),
            *("rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase"),
            *("title", "upper", "zfill"),
        )
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(("bit_length",)),
    float: frozenset(("is_integer",)),
    bytes: frozenset(),
}
# jinja2's filters whose results have a known bound.
FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby"),
    *("indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr"),
    *("replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim"),
    *("unique", "upper", "wordcount"),
)


class Budget:
    """The lines, time and size that one rendering may still use.

    Args:
        check: raises to cancel.
        steps: most lines of Python.
    """

    def __init__(self, check: Callable[[], None], steps: int) -> None:
        self._check = check
        self._steps = steps
        self._until = time.monotonic() + _LONGEST_S
        self._size = 0
        self._line = self._count

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Count every line of Python in this thread, and the size of all that templates make, within the block."""
        before, token = sys.gettrace(), BUDGET.set(self)
        sys.settrace(self._line)
        try:
            yield
        finally:
            sys.settrace(before)
            BUDGET.reset(token)

    def charge(self, value: Any) -> None:
        """Add the size of a value; TemplateRuntimeError if all values together are too large."""
        self._size += weight(value)
        if self._size > _MOST_MADE:
            raise TemplateRuntimeError("it makes far more text than a prompt has")

    def _count(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename == __file__:
            return None
        self._steps -= 1
        if self._steps % _LOOK_EVERY == 0:
            self._look()
        return self._line

    def _look(self) -> None:
        if self._steps <= 0 or time.monotonic() > self._until:
            raise TemplateRuntimeError("it does not come to an end")
        self._check()


BUDGET: ContextVar[Budget | None] = ContextVar("qwenvl_template_budget", default=None)


def weight(value: Any) -> int:
    """Return about how many characters a value has, written out.

    A value that a list holds several times counts every time, as it is written and compared every time.

    Raises:
        jinja2.TemplateRuntimeError: it has more than LARGEST.
    """
    total, waiting = 0, [value]
    while waiting and total <= LARGEST:
        part = waiting.pop()
        total += _VALUE
        if isinstance(part, str | bytes):
            total += len(part)
        elif isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            waiting += part
    _require(total)
    return total


def require_small(operator: str, left: Any, right: Any) -> None:
    """Raise jinja2.TemplateRuntimeError if the result of an operator would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else max(left.bit_length(), right.bit_length())
        _require(0 if bits <= _MOST_BITS else LARGEST + 1)
    elif operator == "*":
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        size = len(repeated) if isinstance(repeated, str | bytes) else weight(repeated)
        _require(size * times if isinstance(times, int) else 0)
    elif operator == "%" and isinstance(left, str | bytes):
        _require_form(str(left))
        weight(right)


def require_small_call(called: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Return the arguments of a call, with a generator, which can be read only once, turned into a list.

    Raises:
        jinja2.TemplateRuntimeError: it is a method of a text, and its result or search would be too large.
    """
    # jinja2 wraps str.format in a function of its own.
    method = getattr(called, "__wrapped__", called)
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(text, str):
        return args
    args = [list(args[0]), *args[1:]] if name == "join" and args else args
    weight([*args, *kwargs.values()])
    first = next(iter([*args, *kwargs.values()]), None)
    if name == "join":
        _require_joined(text, first or ())
    elif name == "replace" and len(args) > 1:
        _require_replaced(text, *args[:2])
    elif name == "format":
        _require_form(text)
    elif isinstance(first, int):
        _require(first)  # a width
    elif isinstance(first, str) and ("strip" in name or name.startswith("r")):
        _require_found(text, first)
    return args


def checked_filter(name: str, original: Callable[..., Any], charged: Callable[[Any], Any]) -> Callable[..., Any]:
    """Wrap a filter of jinja2 so that its arguments are checked, and its result goes through `charged`."""
    require = _REQUIRE.get(name)

    @wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # Some filters get the context or environment as their first argument.
        skip = 1 if args and isinstance(args[0], Context | EvalContext | Environment) else 0
        if name == "join" and len(args) > skip:
            args = (*args[:skip], list(args[skip]), *args[skip + 1 :])
        weight([*args[skip:], *kwargs.values()])
        if require:
            require(*args[skip:], *kwargs.values())
        return charged(original(*args, **kwargs))

    return checked


def _require(size: int) -> None:
    if size > LARGEST:
        raise TemplateRuntimeError(f"it makes a text, list or number of more than {LARGEST:,} characters")


def _require_joined(between: Any, parts: Sequence[Any]) -> None:
    _require(weight(parts) + len(str(between)) * len(parts))


def _require_replaced(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    _require(len(str(text)) + str(text).count(str(old)) * len(str(new)))


def _require_found(text: Any, wanted: Any = "", *_: Any) -> None:
    if len(str(text)) * len(str(wanted or "")) > _LONGEST_SEARCH:
        raise TemplateRuntimeError("it looks for a long text within a long text")


def _require_form(form: str) -> None:
    if len(form) > _LONGEST_FORM or _WIDE.search(form):
        raise TemplateRuntimeError(f"it writes values in a format that is too long or too wide: {form[:99]!r}")


def _require_margin(text: Any, width: Any = 4, *_: Any) -> None:
    margin = len(width) if isinstance(width, str) else width
    _require((len(str(text).splitlines()) + 1) * margin)


def _require_digits(_: Any, *numbers: Any) -> None:
    if any(isinstance(number, int) and abs(number) > _WIDEST for number in numbers):
        raise TemplateRuntimeError("it rounds to more digits than a number has")


def _require_number(text: Any, *_: Any) -> None:
    if isinstance(text, str) and len(text) > _WIDEST:
        raise TemplateRuntimeError("it reads a number of thousands of digits")


def _require_lines(value: Any, *how: Any) -> None:
    """Check that JSON's indentation and separators are short, and its text not too large."""
    for part in [part for option in how for part in (option if isinstance(option, list | tuple) else [option])]:
        if (isinstance(part, str) and len(part) > _VALUE) or (isinstance(part, int) and part > _VALUE):
            raise TemplateRuntimeError("it writes JSON with margins that are too wide")
    # A value may be nested as deep as Python's recursion limit, a thousand, and is indented as often.
    indented = any(option for option in how if isinstance(option, int | str) and not isinstance(option, bool))
    _require(weight(value) * (_WIDEST if indented and weight(value) > LARGEST // _WIDEST else 1))


_REQUIRE: dict[str, Callable[..., None]] = {
    "indent": _require_margin,
    "int": _require_number,
    "float": _require_number,
    "join": lambda parts, between="", *_: _require_joined(between, parts),
    "replace": _require_replaced,
    "round": _require_digits,
    "tojson": _require_lines,
    "trim": _require_found,
}
