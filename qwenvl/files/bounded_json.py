"""The one reader of JSON files: their size and their number of values are limited before they are parsed.

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
    """The limits of a kind of file.

    Attributes:
        size: most bytes.
        values: most JSON values, of which each takes about 100 bytes in memory; 0 for no limit.
    """

    size: int
    values: int


# Configurations: the longest one published has 0.1 MB and some thousand values: names of layers that are not quantized.
SETTINGS = Limit(8 << 20, 1 << 18)
# Tokenizers: those with 250,000 words have 11 to 33 MB and at most 1.2 million values.
TOKENIZER = Limit(64 << 20, 3 << 20)
# Indexes of weights: that of a mixture with a trillion weights has 15 MB and 140,000 names.
INDEX = Limit(32 << 20, 1 << 20)
# The header of one file of weights: a dozen values for a tensor.
HEADER = Limit(32 << 20, 1 << 21)
# Chat templates, which are not JSON: the longest have 20 KB, and transformers compiles them.
TEMPLATE = Limit(1 << 20, 0)
_KINDS = {
    "*.index.json": INDEX,
    **dict.fromkeys(("tokenizer.json", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json"), TOKENIZER),
    "*.jinja": TEMPLATE,
}
_OPENING = (b",", b"[", b"{", b":")


class UnreadableError(ValueError):
    """A file that does not hold what it should; `reason` says why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read: {reason}.")
        self.path, self.reason = path, reason


class OversizeError(UnreadableError):
    """A file that is larger, or nested deeper, than any real file of its kind."""


def limit_of(name: str) -> Limit:
    """Return the limit for a file of that name."""
    return next((limit for pattern, limit in _KINDS.items() if fnmatch(name.lower(), pattern)), SETTINGS)


def read_json_object(path: Path, limit: Limit | None = None) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        limit: None takes the limit for its name.

    Raises:
        OversizeError: it is too large, or nested too deep.
        UnreadableError: the file does not exist, is not text, or holds anything but one JSON object.
    """
    try:
        found = parse(content_of(path, limit), limit or limit_of(path.name))
    except RecursionError as error:
        raise OversizeError(path, "it is nested too deep") from error
    except UnreadableError:
        raise
    except ValueError as error:  # invalid UTF-8 or JSON, or a number of thousands of digits
        raise UnreadableError(path, str(error)) from error
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UnreadableError(path, reason) from error
    if not isinstance(found, dict):
        raise UnreadableError(path, "it must hold a JSON object")
    return found


def parse(content: bytes, limit: Limit) -> Any:
    """Parse untrusted JSON in UTF-8.

    Raises:
        ValueError: it is not JSON, or exceeds the limit.
        RecursionError: it is nested too deep.
    """
    if reason := why_too_much(content, limit):
        raise ValueError(reason)
    return json.loads(content.decode("utf-8-sig"))


def why_too_much(content: bytes, limit: Limit) -> str | None:
    """Return the reason why content exceeds the limit, or None. Brackets, commas and colons in strings count too."""
    if len(content) > limit.size:
        return f"it is larger than {limit.size:,} bytes"
    if limit.values and sum(map(content.count, _OPENING)) > limit.values:
        return f"it holds more than {limit.values:,} values"
    return None


def content_of(path: Path, limit: Limit | None = None) -> bytes:
    """Return the bytes of a file; OversizeError if they exceed the limit, OSError if the path is not a regular file."""
    limit = limit or limit_of(path.name)
    # Opening a pipe may wait for ever.
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    with path.open("rb") as file:
        content = file.read(limit.size + 1)
    if reason := why_too_much(content, limit):
        raise OversizeError(path, reason)
    return content
