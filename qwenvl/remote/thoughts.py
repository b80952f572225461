"""Finds out if an engine's prompts end in an open think block: a thought then comes without <think>.

The chat template opens the block, and only the engine sees it. If max_tokens ends a text without a mark, it may be a
thought or an answer. A short question settles it: if its answer ends without </think>, no block was open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ..log import log
from ..models.engines import Engine
from ..process import PROCESS
from ..prompting.answer import THINK_END, THINK_START
from .chat import ALSO, MAY_DROP
from .client import Wire
from .refusals import EngineError
from .reply import Reply

# A model that does not think answers in a token or two; one that thinks is hardly done with its thought by then.
_QUESTION, _MOST_TOKENS = "Answer with one word: yes.", 64
# Fields of the question that was cut off, which the short question does not have.
_ITS_OWN = ("stop", "min_tokens", "thinking_token_budget", ALSO["thinking_token_budget"])


def known(engine: Engine, thinking: str) -> bool | None:
    """Tell if the block is open before the engine's texts; None if that is not known yet.

    Args:
        thinking: the request's setting.
    """
    return PROCESS.opens_thought.get((engine.base_url, engine.model, thinking))


class Thoughts:
    """Tells thoughts from answers during one run, if thinking is not "on".

    Args:
        thinking: the request's setting. Some templates and some engines ignore "off".
    """

    def __init__(self, engine: Engine, wire: Wire, thinking: str) -> None:
        self._engine = engine
        self._wire = wire
        self._thinking = thinking
        self._key = (engine.base_url, engine.model, thinking)
        self._asking = asyncio.Lock()

    async def opened(self, reply: Reply, sent: Mapping[str, Any]) -> bool | None:
        """Tell if the block was open before the text of this reply; None if that is not known and does not matter.

        Args:
            reply: the complete reply.
            sent: the body of its request.
        """
        marked = _marked(reply)
        # With "off", a mark may be a word of the answer.
        if marked and self._thinking == "auto":
            PROCESS.opens_thought.setdefault(self._key, True)
        cut_off = marked is None and reply.ended == "length" and reply.text.strip()
        if cut_off or (marked and self._thinking == "off"):
            # Many answers may be cut off at a time: only one of them asks.
            async with self._asking:
                found = known(self._engine, self._thinking)
                return await self._ask(sent, otherwise=not marked) if found is None else found
        return known(self._engine, self._thinking)

    async def _ask(self, sent: Mapping[str, Any], otherwise: bool) -> bool:
        """Find out by a short question.

        Args:
            otherwise: the result if the question fails. It is chosen so that half a thought does not become an answer,
                nor a whole answer a thought.
        """
        kept = {name: value for name, value in sent.items() if name not in _ITS_OWN}
        greedy = {"temperature": 0.0} if "temperature" in sent else {}
        asked = {**kept, **greedy, "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": _MOST_TOKENS}
        try:
            reply = await self._wire.complete(asked, MAY_DROP, lambda _: None)
        except EngineError as error:
            log.warning("it is not known whether %s thinks before it answers: %s", self._engine.model, error)
            return otherwise
        marked = _marked(reply)
        found = reply.ended == "length" if marked is None else marked
        log.info("%s %s before it answers", self._engine.model, "thinks" if found else "does not think")
        PROCESS.opens_thought[self._key] = found
        return found


def _marked(reply: Reply) -> bool | None:
    """Tell by the marks in a text if a block was open before it; None if it holds no mark. Pure."""
    # An engine that sends thoughts in a field of their own sends none as text.
    if reply.thinking or reply.text.lstrip().startswith(THINK_START):
        return False
    return True if THINK_END in reply.text else None
