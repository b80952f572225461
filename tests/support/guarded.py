"""Checks what hostile input may cause: a result or one of our own errors with a sentence, and no other change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image, ImageFile

from qwenvl.log import log

# A message is read by people.
LONGEST_MESSAGE = 4000


def outcome(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Return the call's result, or the error of ours that it raises. Any other error escapes."""
    try:
        return call(*given, **named)
    except (ValueError, RuntimeError) as error:
        if "qwenvl" not in type(error).__module__.lower():
            raise
        message = str(error)
        assert len(message.split()) > 3, f"no sentence: {message!r}"
        assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]!r}"
        return error


@contextmanager
def unchanged() -> Iterator[None]:
    """Check that the block leaves the state of the process as it was, and no file open."""
    before = _globals()
    yield
    after = _globals()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"changed: {', '.join(changed)}"


def _globals() -> dict[str, Any]:
    return {
        # As it is kept: decoding all of it would take as long as most of the readers.
        "environment": dict(os.environ._data),
        "working directory": os.getcwd(),  # noqa: PTH109 (faster)
        "open files": len(os.listdir("/proc/self/fd")) if os.name == "posix" else 0,  # noqa: PTH208
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "torch's settings": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
        "Pillow's limits": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK),
        "log level": log.logger.level,
    }
