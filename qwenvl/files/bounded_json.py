"""The one reader of JSON files: how long one may be, and how much may come of it, is known before it is parsed.

Three bytes of text may become seventy in memory, so the values are counted too, in one pass over the bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of a kind of file is taken.

    Attributes:
        size: bytes.
        values: of JSON; each takes about 100 bytes in memory.
    """

    size: int
    values: int


# The longest of published models has 0.1 MB and some thousand values: names of layers that are not quantized.
SETTINGS = Limit(8 << 20, 1 << 18)
# Those of models with 250,000 words have 11 to 33 MB and at most 1.2 million values.
TOKENIZER = Limit(64 << 20, 3 << 20)
# That of a mixture of a trillion weights has 15 MB and 140,000 names.
INDEX = Limit(32 << 20, 1 << 20)
# Of one file of weights, with a dozen values for a tensor.
HEADER = Limit(32 << 20, 1 << 21)
# No JSON. The longest are 20 KB; transformers compiles them.
TEMPLATE = Limit(1 << 20, 0)
_KINDS = {
    "*.index.json": INDEX,
    **dict.fromkeys(("tokenizer.json", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json"), TOKENIZER),
    "*.jinja": TEMPLATE,
}
_OPENING = (b",", b"[", b"{", b":")


class UnreadableError(ValueError):
    """A file that does not hold what it should; reason says why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read: {reason}.")
        self.path, self.reason = path, reason


class OversizeError(UnreadableError):
    """A file that holds more, or is nested deeper, than any of its kind."""


def limit_of(name: str) -> Limit:
    """How much is taken of a file of that name."""
    return next((limit for pattern, limit in _KINDS.items() if fnmatch(name.lower(), pattern)), SETTINGS)


def read_json_object(path: Path, limit: Limit | None = None) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        limit: None takes that of its name.

    Raises:
        OversizeError: it is too large, or nested too deep.
        UnreadableError: there is no such file, it is no text, or it holds anything but one JSON object.
    """
    try:
        found = parse(content_of(path, limit), limit or limit_of(path.name))
    except RecursionError as error:
        raise OversizeError(path, "it is nested too deep") from error
    except UnreadableError:
        raise
    except ValueError as error:  # no UTF-8, a number of thousands of digits
        raise UnreadableError(path, str(error)) from error
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UnreadableError(path, reason) from error
    if not isinstance(found, dict):
        raise UnreadableError(path, "it must hold a JSON object")
    return found


def parse(content: bytes, limit: Limit) -> Any:
    """What JSON holds that has come from anywhere, in UTF-8.

    Raises:
        ValueError: it is none, or more than the limit. RecursionError: it is nested too deep.
    """
    if reason := why_too_much(content, limit):
        raise ValueError(reason)
    return json.loads(content.decode("utf-8-sig"))


def why_too_much(content: bytes, limit: Limit) -> str | None:
    """Why JSON is not parsed, or None. What strings hold counts as if it were JSON."""
    if len(content) > limit.size:
        return f"it is larger than {limit.size:,} bytes"
    if limit.values and sum(map(content.count, _OPENING)) > limit.values:
        return f"it holds more than {limit.values:,} values"
    return None


def content_of(path: Path, limit: Limit | None = None) -> bytes:
    """What is in a file. Raises OversizeError where that is more than the limit, OSError where it is no file."""
    limit = limit or limit_of(path.name)
    # Opening what is no file may wait for ever.
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    with path.open("rb") as file:
        content = file.read(limit.size + 1)
    if reason := why_too_much(content, limit):
        raise OversizeError(path, reason)
    return content
