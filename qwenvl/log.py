"""One logger, and bytes in its words. ComfyUI prints the bare message, so the prefix stands in the message."""

from __future__ import annotations

import logging

from .checks import printable


class _Prefixed(logging.LoggerAdapter):
    def process(self, msg: str, kwargs):
        return f"[QwenVL] {msg}", kwargs


class _Printable(logging.Filter):
    """The log is written to a terminal and shown on a page, whoever owns their handlers."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True


logging.getLogger("qwenvl").addFilter(_Printable())
log = _Prefixed(logging.getLogger("qwenvl"), {})


class PrintableFormatter(logging.Formatter):
    """For a handler that writes what others log too, with their tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def gigabytes(count: float, digits: int = 1) -> str:
    """3.1 GB"""
    return f"{count / 1e9:.{digits}f} GB"


def amount(count: float, total: float | None = None) -> str:
    """3.1 GB, or 85.0 MB of what is less than one; with a total, in the unit of that: 2.1 of 8.9 GB."""
    most = count if total is None else total
    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    so_far = "" if total is None else f"{count / unit:.1f} of "
    return f"{so_far}{most / unit:.1f} {name}"
