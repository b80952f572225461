"""The watch of a running node: sends progress to ComfyUI's page, and checks for a cancel.

Pages get the event "qwenvl.progress", which names the prompt and its workflow. ComfyUI's own text event names the
node's id alone, so the page would show it on any node with that id in the open workflow. It is sent in addition to
clients that queue prompts without a workflow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import host
from .host import model_management

EVENT = "qwenvl.progress"
# Every event replaces the whole text on the node, so more of them would only cost bandwidth.
LIVE_TEXT_INTERVAL_S = 0.2
# The most characters that are sent of a text: an engine may answer in megabytes.
LIVE_TEXT_LIMIT = 20_000
# Put before the thinking in ComfyUI's own event, as it is not part of the answer.
THINKING_MARK = "[thinking]"
# Marks where a text was cut.
CUT_MARK = "…"


class Live:
    """What a node is doing, how much of it is done, and how fast since the first count."""

    def __init__(self) -> None:
        self.state = "starting"
        self._facts: Mapping[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        self._done: int | None = None
        self._unit = ""
        self._total: int | None = None
        self._first: tuple[float, int] | None = None
        self._per_s: float | None = None

    def stage(self, state: str, facts: Mapping[str, Any]) -> None:
        """Begin another state, and restart the count."""
        self.state, self._facts = state, facts
        self._begin()

    def count(self, state: str, done: int, unit: str, total: int | None = None) -> None:
        """Record that `done` units are done now."""
        if unit != self._unit:
            self.stage(state, {})
        now = time.monotonic()
        self.state, self._done, self._unit, self._total = state, done, unit, total
        # The speed starts at the first count: otherwise reading pictures would make the first tokens look slow.
        start, before = self._first = self._first or (now, done)
        if done > before and now > start:
            self._per_s = (done - before) / (now - start)

    def fields(self) -> dict[str, Any]:
        """Build the fields that are sent to the page."""
        counts = {"done": self._done, "total": self._total, "unit": self._unit, "per_s": self._per_s}
        return {"state": self.state, **self._facts, **counts}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node's progress is shown."""

    prompt_id: str
    node_id: str | None
    # The client id of the page that queued the prompt; None if it has none.
    browser: str | None
    # The id of the workflow that it was queued from, which may be empty; None without a workflow.
    workflow: str | None


def place() -> Place:
    """Find the place of the node that is running now."""
    server, context = host.PromptServer.instance, host.get_executing_context()
    prompt_id, node_id = (context.prompt_id, context.node_id) if context else ("", server.last_node_id)
    for _, running, _, extra, *_ in list(server.prompt_queue.currently_running.values()):
        if running == prompt_id:
            return Place(prompt_id, node_id, extra.get("client_id"), _workflow_of(extra))
    # The server's client_id belongs to the prompt that began last.
    return Place(prompt_id, node_id, server.client_id, None)


def _workflow_of(extra: Mapping[str, Any]) -> str | None:
    """Read the workflow's id from the client's extra data, which may hold anything."""
    info = extra.get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    return str(workflow.get("id") or "") if isinstance(workflow, dict) else None


def end_of(text: str) -> str:
    """Cut the text to its last LIVE_TEXT_LIMIT characters, for sending it many times."""
    return text if len(text) <= LIVE_TEXT_LIMIT else CUT_MARK + text[-LIVE_TEXT_LIMIT:]


def beginning_of(text: str) -> str:
    return text if len(text) <= LIVE_TEXT_LIMIT else text[:LIVE_TEXT_LIMIT] + CUT_MARK


class NodeWatch:
    """The watch of the node that is running now: progress bar, live text and cancel."""

    def __init__(self, max_new_tokens: int) -> None:
        self._bar: Any = None
        self._place: Place | None = None
        self._sent = (float("-inf"), "")
        self._max_new_tokens = max_new_tokens
        self._thinking = ""
        self._live = Live()
        if model_management is not None:
            self._place = place()
            self._bar = host.ProgressBar(max_new_tokens, node_id=self._place.node_id)
            self._send("")

    def check(self) -> None:
        """Raise ComfyUI's own interrupt if the user pressed cancel."""
        if model_management is not None:
            model_management.throw_exception_if_processing_interrupted()

    def stage(self, state: str, **facts: Any) -> None:
        """Show that something begins that takes time and is not counted."""
        self._live.stage(state, facts)
        self._send("")

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None:
        """Show how many of how many bytes of a model are there, and a line that says so.

        Args:
            state: "downloading", or "checking" while files that lie there already are read.
        """
        if state != self._live.state:
            self._live.stage(state, {})
        self._live.count(state, done, "bytes", total)
        if self._move(done, total):
            self._send("", instead=text)

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        """Show, after every token, the number of tokens, the whole answer so far, and the thinking before it."""
        self._live.count("thinking" if thinking and not text else "answering", new_tokens, "tokens")
        if self._move(new_tokens, self._max_new_tokens):
            self._thinking = end_of(thinking)
            self._send(end_of(text))

    def read(self, done: int, total: int) -> None:
        """Called after every picture that a node reads, of so many; no model is asked."""
        self._live.count("reading", done, "pictures", total)
        if self._move(done, total):
            self._send(f"{done} of {total} pictures")

    def advance(self, done: int, total: int | None, text: str) -> None:
        """Show, for many answers, how many are finished, how many there are (None if unknown), and the latest."""
        self._live.count("answering", done, "answers", total)
        if self._move(done, total):
            text = end_of(text)
            self._send(text, instead=f"{done} of {total}\n\n{text}" if total else f"{done}\n\n{text}")

    def end(self, text: str) -> None:
        """Show the final answer, once. A cancel has no effect any more."""
        if self._bar:
            self._bar.update_absolute(self._bar.total, self._bar.total)
        self._live.state = "done"
        text = beginning_of(text)
        self._send(text, instead=text)

    def _move(self, value: int, total: int | None) -> bool:
        """Move the bar; return True if it is time to send another event."""
        self.check()
        if self._bar:
            self._bar.update_absolute(value, total or self._max_new_tokens)
        when, state = self._sent
        return state != self._live.state or time.monotonic() - when >= LIVE_TEXT_INTERVAL_S

    def _send(self, text: str, instead: str = "") -> None:
        """Send the text to the page that queued the prompt.

        Args:
            instead: what clients without a workflow get in place of the text.
        """
        shown = self._place
        # An event without a client id would go to all pages.
        if shown is None or shown.node_id is None or shown.browser is None:
            return
        self._sent = (time.monotonic(), self._live.state)
        server, thinking = host.PromptServer.instance, self._thinking
        where = {"node": shown.node_id, "prompt_id": shown.prompt_id, "workflow": shown.workflow}
        server.send_sync(EVENT, {**where, **self._live.fields(), "text": text, "thinking": thinking}, shown.browser)
        plain = instead or (f"{THINKING_MARK} {thinking}\n\n{text}" if thinking else text)
        if plain and shown.workflow is None:
            server.send_progress_text(plain, shown.node_id, shown.browser)
