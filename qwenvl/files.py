"""JSON files of models, read within bounds, and one error for all that may be wrong. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The index of a model of a terabyte has 5 MB.
LARGEST = 64 << 20


class UnreadableError(ValueError):
    """A file that does not hold what it should; reason says why, without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read: {reason}.")
        self.reason = reason


def read_json_object(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        largest: bytes of a file that is still read.

    Raises:
        UnreadableError: there is no such file, it is too large or no text, or it holds anything but one JSON object.
    """
    try:
        content = json.loads(_text(path, largest))
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of thousands of digits, nested too deep
        raise UnreadableError(path, str(error)) from error
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UnreadableError(path, reason) from error
    if not isinstance(content, dict):
        raise UnreadableError(path, "it must hold a JSON object")
    return content


def _text(path: Path, largest: int) -> str:
    # Opening what is no file may wait for ever.
    if path.exists() and not path.is_file():
        raise OSError("it is no file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(f"it is larger than {largest:,} bytes")
    return content.decode()
