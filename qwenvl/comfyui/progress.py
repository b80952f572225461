"""What a node tells ComfyUI's page while it runs, and how it hears of a cancel."""

from __future__ import annotations

import time
from typing import Any

from . import host
from .host import model_management

# A text event replaces the whole text on the node, so more of them would only cost bandwidth.
LIVE_TEXT_INTERVAL_S = 0.2
# Before what a model thinks, in the live text: it is not part of the answer.
THINKING_MARK = "[thinking]"


class Live:
    """Counts what is made, and measures how fast since it first saw some."""

    def __init__(self) -> None:
        self._thinking = ""
        self._done: int | None = None
        self._unit = ""
        self._first: tuple[float, int] | None = None
        self._per_s: float | None = None

    def count(self, done: int, unit: str, thinking: str = "") -> None:
        """So many of them are there now."""
        now = time.monotonic()
        self._done, self._unit, self._thinking = done, unit, thinking
        # What came before the first count is not counted: reading pictures would make the first tokens look slow.
        start, before = self._first = self._first or (now, done)
        if done > before and now > start:
            self._per_s = (done - before) / (now - start)

    def told(self, node_id: str) -> dict[str, Any]:
        """The same as the page is told it."""
        return {
            "node": node_id,
            "thinking": self._thinking,
            "done": self._done,
            "unit": self._unit,
            "per_s": self._per_s,
        }


def _browser_of(prompt_id: str) -> str | None:
    """Which page queued the prompt. The server's own client_id is that of the prompt that began last."""
    server = host.PromptServer.instance
    for _, running, _, extra, *_ in list(server.prompt_queue.currently_running.values()):
        if running == prompt_id:
            return extra.get("client_id")
    return server.client_id


class NodeWatch:
    """Progress bar, live text and cancel of the node that is running now."""

    def __init__(self, max_new_tokens: int) -> None:
        self._bar: Any = None
        self._node_id: str | None = None
        self._browser: str | None = None
        self._sent_at = 0.0
        self._max_new_tokens = max_new_tokens
        self._live = Live()
        if model_management is not None:
            context = host.get_executing_context()
            self._node_id = context.node_id if context else host.PromptServer.instance.last_node_id
            self._browser = _browser_of(context.prompt_id if context else "")
            self._bar = host.ProgressBar(max_new_tokens, node_id=self._node_id)

    def check(self) -> None:
        """Raise ComfyUI's own interrupt if the user pressed cancel."""
        if model_management is not None:
            model_management.throw_exception_if_processing_interrupted()

    def report(self, done: int, total: int, text: str) -> None:
        """Called while a model is downloaded: how many of how many bytes are there, and a line that says so."""
        self._tell(done, total, text)

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        """Called after every token with the number of them, the whole answer so far, and the thought before it."""
        self._live.count(new_tokens, "tokens", thinking)
        self._tell(new_tokens, self._max_new_tokens, f"{THINKING_MARK} {thinking}\n\n{text}" if thinking else text)

    def advance(self, done: int, total: int | None, text: str) -> None:
        """Called with many answers: how many are finished of how many, and the latest."""
        self._live.count(done, "answers")
        self._tell(done, total, f"{done} of {total}\n\n{text}" if total else f"{done}\n\n{text}")

    def end(self, text: str) -> None:
        """Called once with the final answer."""
        if self._bar:
            self._tell(self._bar.total, self._bar.total, text, last=True)

    def _tell(self, value: int, total: int | None, text: str, last: bool = False) -> None:
        """The last one is told however soon it comes, and nothing can cancel it any more."""
        if not last:
            self.check()
        if self._bar:
            self._bar.update_absolute(value, total or self._max_new_tokens)
        now = time.monotonic()
        if not last and now - self._sent_at < LIVE_TEXT_INTERVAL_S:
            return
        self._sent_at = now
        if self._node_id is not None and self._browser is not None:
            server = host.PromptServer.instance
            # Sent to no page in particular, all would show it. The first is for our own widget, if it is there.
            server.send_sync("qwenvl.progress", self._live.told(self._node_id), self._browser)
            server.send_progress_text(text, self._node_id, self._browser)
