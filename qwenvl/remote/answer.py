"""An engine's reply -> the thought and the answer in it, while it comes."""

from __future__ import annotations

from ..checks import whole_characters
from ..models.engines import Engine
from ..prompting.answer import THINK_END, THINK_START, cut_before, split_thinking
from ..request import Answer, Request
from .reply import Reply
from .secret import Secret
from .thoughts import known


class EngineAnswer:
    """One answer while it comes from an engine.

    Args:
        secret: the engine's key, which it may have put into the answer, in whatever pieces.
    """

    over_budget = False

    def __init__(self, engine: Engine, request: Request, secret: Secret) -> None:
        self._secret = secret
        self._stops = request.sampling.stop
        self._may_think = request.thinking != "off"
        # Whether the template opened the think block; None where that is not known. Not every template and not every
        # engine heeds a wish that there be none.
        self.opened = known(engine, request.thinking) if request.thinking != "on" else True
        self.reply = Reply(0.0)

    @property
    def tokens(self) -> int:
        """How many there are: the engine's count where it has come, until then the pieces."""
        return self.reply.count("completion_tokens") or self.reply.pieces

    @property
    def ended(self) -> bool:
        return bool(self.reply.ended)

    @property
    def so_far(self) -> Answer:
        """What is certain of it."""
        thinking, text = self._split()
        certain = self._secret.certain
        return Answer(certain(cut_before(text or "", self._stops)), certain(thinking))

    def end(self) -> Answer | None:
        """The whole of it; None where the model only thought, or its tokens ran out before it said anything."""
        thinking, text = self._split()
        if self.said_nothing:
            return None
        if text is None and self.reply.ended != "length" and not self.reply.text.lstrip().startswith(THINK_START):
            # It ended by itself and closed no block, so there was none.
            thinking, text = "", thinking
        if text is None or (thinking and not text):
            return None
        hidden = self._secret.hidden_answer
        return Answer(hidden(cut_before(text, self._stops).strip()), hidden(thinking))

    @property
    def said_nothing(self) -> bool:
        """Whether the tokens ran out and nothing of them was sent: an engine may keep thoughts to itself."""
        return self.reply.ended == "length" and not (self.reply.text.strip() or self.reply.thinking.strip())

    def _split(self) -> tuple[str, str | None]:
        """(thinking, answer) as far as they have come."""
        # Only here: the halves of a character may come in two pieces.
        text, thinking = whole_characters(self.reply.text), whole_characters(self.reply.thinking)
        if thinking:
            # Of a thought that the engine ended itself, the end may have come as text.
            rest, _, text = text.rpartition(THINK_END)
            return f"{thinking}{rest}".strip(), text.strip()
        closed = self._may_think and THINK_END in text
        return split_thinking(text, bool(self.opened) or closed)
