"""The pack's logger, and byte counts in words. ComfyUI prints the bare message, so the message holds the prefix."""

from __future__ import annotations

import logging

from .checks import printable


class _Prefixed(logging.LoggerAdapter):
    def process(self, msg: str, kwargs):
        return f"[QwenVL] {msg}", kwargs


class _Printable(logging.Filter):
    """Escapes control characters in every record: other code's handlers show the log on terminals and pages."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True


logging.getLogger("qwenvl").addFilter(_Printable())
log = _Prefixed(logging.getLogger("qwenvl"), {})


class PrintableFormatter(logging.Formatter):
    """Escapes control characters in other packages' messages and tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def gigabytes(count: float, digits: int = 1) -> str:
    """Format bytes in gigabytes: 3.1 GB."""
    return f"{count / 1e9:.{digits}f} GB"


def amount(count: float, total: float | None = None) -> str:
    """Format bytes: 3.1 GB, or 85.0 MB below 1 GB; with a total, in the total's unit: 2.1 of 8.9 GB."""
    most = count if total is None else total
    unit, name = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    so_far = "" if total is None else f"{count / unit:.1f} of "
    return f"{so_far}{most / unit:.1f} {name}"
