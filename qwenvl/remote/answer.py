"""Splits an engine's reply into thought and answer, while it comes."""

from __future__ import annotations

from ..checks import whole_characters
from ..models.engines import Engine
from ..prompting.answer import THINK_END, THINK_START, cut_before, split_thinking
from ..request import Answer, Request
from .reply import Reply
from .secret import Secret
from .thoughts import known


class EngineAnswer:
    """One answer of an engine, while it comes.

    Args:
        secret: the engine's key, which the engine may repeat in the answer, cut into any pieces.
    """

    over_budget = False

    def __init__(self, engine: Engine, request: Request, secret: Secret) -> None:
        self._secret = secret
        self._stops = request.sampling.stop
        self._may_think = request.thinking != "off"
        # True if the template opened the think block; None if that is not known. Some templates and engines open one
        # although thinking is off.
        self.opened = known(engine, request.thinking) if request.thinking != "on" else True
        self.reply = Reply(0.0)

    @property
    def tokens(self) -> int:
        """Count the tokens: the engine's own count if it has come, until then the pieces."""
        return self.reply.count("completion_tokens") or self.reply.pieces

    @property
    def ended(self) -> bool:
        return bool(self.reply.ended)

    @property
    def so_far(self) -> Answer:
        """Return the part of the answer that will not change."""
        thinking, text = self._split()
        certain = self._secret.certain
        return Answer(certain(cut_before(text or "", self._stops)), certain(thinking))

    def end(self) -> Answer | None:
        """Return the complete answer; None if the model only thought, or its tokens ran out before any text came."""
        thinking, text = self._split()
        if self.is_empty:
            return None
        if text is None and self.reply.ended != "length" and not self.reply.text.lstrip().startswith(THINK_START):
            # It ended by itself without closing a think block, so no block was open.
            thinking, text = "", thinking
        if text is None or (thinking and not text):
            return None
        hidden = self._secret.hidden_answer
        return Answer(hidden(cut_before(text, self._stops).strip()), hidden(thinking))

    @property
    def is_empty(self) -> bool:
        """Tell if the tokens ran out and no text was sent: some engines do not send thoughts."""
        return self.reply.ended == "length" and not (self.reply.text.strip() or self.reply.thinking.strip())

    def _split(self) -> tuple[str, str | None]:
        """Return (thinking, answer) as far as they have come."""
        # Not for each piece, because the halves of a character may come in two pieces.
        text, thinking = whole_characters(self.reply.text), whole_characters(self.reply.thinking)
        if thinking:
            # If the engine ended the thought itself, the thought's end may have come as text.
            rest, _, text = text.rpartition(THINK_END)
            return f"{thinking}{rest}".strip(), text.strip()
        closed = self._may_think and THINK_END in text
        return split_thinking(text, bool(self.opened) or closed)
