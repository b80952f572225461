"""One logger. ComfyUI prints the bare message, so the prefix stands in the message."""

from __future__ import annotations

import logging


class _Prefixed(logging.LoggerAdapter):
    def process(self, msg: str, kwargs):
        return f"[QwenVL] {msg}", kwargs


log = _Prefixed(logging.getLogger("qwenvl"), {})
