"""What a node tells ComfyUI's page while it runs, and how it hears of a cancel.

A page is sent the event "qwenvl.progress", which carries the prompt and the workflow that it belongs to. ComfyUI's own
event for text goes by the node's id alone, so it would be shown by whatever has that id in the workflow that is in
sight: it is for programs that queue prompts without a workflow, and they are sent both.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import host
from .host import model_management

EVENT = "qwenvl.progress"
# Each event replaces the whole text on the node, so more of them would only cost bandwidth.
LIVE_TEXT_INTERVAL_S = 0.2
# Characters of a text that are sent while it is made: an engine may answer in megabytes.
LIVE_TEXT_LIMIT = 20_000
# Before what a model thinks, in ComfyUI's own event: it is not part of the answer.
THINKING_MARK = "[thinking]"
# Where less is sent than there is.
CUT_MARK = "…"


class Live:
    """What goes on, how much is made of it, and how fast since some was first seen."""

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
        """Something else goes on now; what was counted was of another kind."""
        self.state, self._facts = state, facts
        self._begin()

    def count(self, state: str, done: int, unit: str, total: int | None = None) -> None:
        """So many of them are there now."""
        if unit != self._unit:
            self.stage(state, {})
        now = time.monotonic()
        self.state, self._done, self._unit, self._total = state, done, unit, total
        # What came before the first count is not counted: reading pictures would make the first tokens look slow.
        start, before = self._first = self._first or (now, done)
        if done > before and now > start:
            self._per_s = (done - before) / (now - start)

    def told(self) -> dict[str, Any]:
        """The same as the page is told it."""
        made = {"done": self._done, "total": self._total, "unit": self._unit, "per_s": self._per_s}
        return {"state": self.state, **self._facts, **made}


@dataclass(frozen=True, slots=True)
class Place:
    """Where what a node tells is shown."""

    prompt_id: str
    node_id: str | None
    # Which page queued the prompt; None for nobody's.
    browser: str | None
    # The id of the workflow that it was queued from, which may be empty; None where there was none.
    workflow: str | None


def place() -> Place:
    """Of the node that is running now."""
    server, context = host.PromptServer.instance, host.get_executing_context()
    prompt_id, node_id = (context.prompt_id, context.node_id) if context else ("", server.last_node_id)
    for _, running, _, extra, *_ in list(server.prompt_queue.currently_running.values()):
        if running == prompt_id:
            return Place(prompt_id, node_id, extra.get("client_id"), _workflow_of(extra))
    # The server's own client_id is that of the prompt that began last.
    return Place(prompt_id, node_id, server.client_id, None)


def _workflow_of(extra: Mapping[str, Any]) -> str | None:
    """Whoever queues a prompt may write there what he likes."""
    info = extra.get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    return str(workflow.get("id") or "") if isinstance(workflow, dict) else None


def end_of(text: str) -> str:
    """The last of it, where it is too much to be sent again and again."""
    return text if len(text) <= LIVE_TEXT_LIMIT else CUT_MARK + text[-LIVE_TEXT_LIMIT:]


def beginning_of(text: str) -> str:
    return text if len(text) <= LIVE_TEXT_LIMIT else text[:LIVE_TEXT_LIMIT] + CUT_MARK


class NodeWatch:
    """Progress bar, live text and cancel of the node that is running now."""

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
        """Called when something begins that takes its time, of which nothing is counted."""
        self._live.stage(state, facts)
        self._send("")

    def report(self, done: int, total: int, text: str) -> None:
        """Called while a model is downloaded: how many of how many bytes are there, and a line that says so."""
        self._live.count("downloading", done, "bytes", total)
        if self._move(done, total):
            self._send("", instead=text)

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        """Called after every token with the number of them, the whole answer so far, and the thought before it."""
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
        """Called with many answers: how many are finished of how many, and the latest."""
        self._live.count("answering", done, "answers", total)
        if self._move(done, total):
            text = end_of(text)
            self._send(text, instead=f"{done} of {total}\n\n{text}" if total else f"{done}\n\n{text}")

    def end(self, text: str) -> None:
        """Called once with the final answer. Nothing can cancel it any more."""
        if self._bar:
            self._bar.update_absolute(self._bar.total, self._bar.total)
        self._live.state = "done"
        text = beginning_of(text)
        self._send(text, instead=text)

    def _move(self, value: int, total: int | None) -> bool:
        """Move the bar; whether it is time to tell more."""
        self.check()
        if self._bar:
            self._bar.update_absolute(value, total or self._max_new_tokens)
        when, state = self._sent
        return state != self._live.state or time.monotonic() - when >= LIVE_TEXT_INTERVAL_S

    def _send(self, text: str, instead: str = "") -> None:
        """
        Args:
            instead: what those are told who have no page of ours.
        """
        shown = self._place
        # Sent to no page in particular, all would show it.
        if shown is None or shown.node_id is None or shown.browser is None:
            return
        self._sent = (time.monotonic(), self._live.state)
        server, thinking = host.PromptServer.instance, self._thinking
        where = {"node": shown.node_id, "prompt_id": shown.prompt_id, "workflow": shown.workflow}
        server.send_sync(EVENT, {**where, **self._live.told(), "text": text, "thinking": thinking}, shown.browser)
        plain = instead or (f"{THINKING_MARK} {thinking}\n\n{text}" if thinking else text)
        if plain and shown.workflow is None:
            server.send_progress_text(plain, shown.node_id, shown.browser)
