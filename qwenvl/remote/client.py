"""One chat completion over HTTP: sent again while the engine is busy, read piece by piece, given up if it stalls.

It uses aiohttp, which comes with every ComfyUI, whose server is built on it. OpenAI's client would add 30 MB and 0.8 s
of import, follow redirects by default, and repeat requests by its own rules; httpx comes with some versions of
huggingface_hub only.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Set
from typing import TYPE_CHECKING, Any

from ..log import log
from ..models.engines import Engine
from ..process import PROCESS
from . import kinds, refusals
from .incoming import LONGEST_WORDS, UnreadableError, beginning, unpacked
from .refusals import EngineError
from .reply import DONE, Reply, event_of, stream_data
from .secret import Secret

if TYPE_CHECKING:
    import aiohttp

# Waits before a question is sent again. The engine may ask for a longer wait, up to the longest.
WAITS_S = (0.5, 1.0, 2.0, 4.0)
LONGEST_WAIT_S = 30.0
CONNECT_S = 10.0
BUSY = (429, 503)
# Most tokens of an answer, if the request sets no limit.
_MOST_TOKENS = 1 << 16
# More characters than the longest tokens have. An engine that sends more ignores max_tokens and may never end.
_MOST_PER_TOKEN = 512
# The same limit in bytes of the stream, with all that stands around a token, and bytes allowed beside them.
_MOST_BYTES_PER_TOKEN, _MOST_BYTES_BESIDE = 1 << 14, 1 << 24
# What hostile answers may raise beside aiohttp's own errors, e.g. with headers that are not text or invalid hosts.
_UNREADABLE = (OSError, ValueError)


class _TryAgainError(Exception):
    """No part of an answer has come, but one may come at another try."""

    def __init__(self, final: EngineError, after_s: float = 0.0) -> None:
        self.final = final
        self.after_s = after_s


class _UnknownFieldsError(Exception):
    """The engine does not know some of the optional fields."""

    def __init__(self, names: Set[str]) -> None:
        self.names = names


class Wire:
    """The connection to an engine during one run.

    Args:
        engine: the engine to connect to.
        key: the engine's key; "" for none. It goes into one header of each request and nowhere else.

    Attributes:
        secret: takes the key out of messages and answers.
        unknown: the fields that the engine has refused as unknown, now or in an earlier run.
    """

    def __init__(self, engine: Engine, key: str) -> None:
        self._engine = engine
        # Answers that are compressed all the same are decompressed here, only as far as they are read.
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.secret = Secret(key)
        self._session: Any = None
        self.unknown = PROCESS.unknown_fields.setdefault((engine.base_url, engine.model), set())

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> Any:
        """Open the HTTP session, in the event loop that uses it."""
        import aiohttp

        patience = aiohttp.ClientTimeout(
            total=None, sock_connect=min(CONNECT_S, self._engine.timeout_s), sock_read=self._engine.timeout_s
        )
        connector = aiohttp.TCPConnector(limit=self._engine.max_concurrency)
        return aiohttp.ClientSession(timeout=patience, connector=connector, auto_decompress=False)

    async def complete(self, body: Mapping[str, Any], may_drop: Set[str], on_piece: Callable[[Reply], None]) -> Reply:
        """Send a question, and return the complete answer.

        Args:
            body: the request.
            may_drop: its optional fields. Those that the engine refuses by name are left out of a second try.
            on_piece: called with the reply whenever it has grown.

        Raises:
            QuestionError: this question got no answer.
            EngineError: the engine will not answer any question.
        """
        self._session = self._session or self._open()
        waits = iter(WAITS_S)
        while True:
            known = {name: value for name, value in body.items() if name not in self.unknown}
            try:
                return await self._ask(known, may_drop & known.keys(), on_piece)
            except _UnknownFieldsError as error:
                self.unknown |= error.names
            except EngineError as error:
                raise self._redacted(error) from None
            except _TryAgainError as error:
                final, wait = self._redacted(error.final), next(waits, None)
                if wait is None:
                    raise final from None
                # Random, so that questions that were refused together are not sent again all at once.
                wait = max(wait * random.uniform(0.75, 1.25), min(error.after_s, LONGEST_WAIT_S))  # noqa: S311
                log.info("%s Asking again in %.1f s.", final, wait)
                await asyncio.sleep(wait)

    async def _ask(self, body: Mapping[str, Any], may_drop: Set[str], on_piece: Callable[[Reply], None]) -> Reply:
        import aiohttp

        reply = Reply(time.perf_counter())
        url = f"{self._engine.base_url}/chat/completions"
        try:
            # No redirects: they would send the key to another address.
            async with self._session.post(url, json=body, headers=self._headers, allow_redirects=False) as response:
                if response.status != 200:
                    await self._refuse(response, may_drop)
                await self._read(response, reply, on_piece, body, may_drop)
                reply.end(body.get("max_tokens", 0))
                if kind := kinds.of_answer(response.headers.get("Server", ""), reply.fingerprint):
                    kinds.remember(self._engine, kind)
                return reply
        except (aiohttp.ClientError, asyncio.TimeoutError, *_UNREADABLE) as error:
            if reply.ended:
                reply.end(body.get("max_tokens", 0))
                return reply
            problem = self._problem(error, reply)
        # Raised outside the except block: aiohttp's errors hold the request, and so the key, in their attributes.
        raise problem

    async def find_kind(self) -> None:
        """Fetch the engine's list of models, which shows the kind of many engines."""
        import aiohttp

        patience = {"timeout": aiohttp.ClientTimeout(total=CONNECT_S), "allow_redirects": False}
        body = ""
        try:
            address = f"{self._engine.base_url}/models"
            async with self._session.get(address, headers=self._headers, **patience) as response:
                body = await beginning(_blocks(response)) if response.status == 200 else ""
        except (aiohttp.ClientError, asyncio.TimeoutError, *_UNREADABLE) as error:
            log.debug("engine %r does not list its models: %s", self._engine.name, type(error).__name__)
        kinds.remember(self._engine, kinds.of_models(body))

    async def _read(
        self,
        response: aiohttp.ClientResponse,
        reply: Reply,
        on_piece: Callable[[Reply], None],
        body: Mapping[str, Any],
        may_drop: Set[str],
    ) -> None:
        tokens = body.get("max_tokens", _MOST_TOKENS)
        most = _MOST_PER_TOKEN * tokens
        if response.content_type != "text/event-stream":
            raise refusals.garbage(self._engine, self.secret.hidden(await beginning(_blocks(response))))
        async for data in stream_data(_at_most(tokens, _blocks(response))):
            if data == DONE:
                reply.ended = reply.ended or "stop"
                break
            if reply.take(self._event(data, may_drop if not reply.pieces else frozenset())):
                on_piece(reply)
            if len(reply.text) + len(reply.thinking) > most:
                raise refusals.broken_off(self._engine, f"it has more than {most:,} characters, and is not at its end")
        if reply.broken:
            raise refusals.broken_off(self._engine, f"the engine ended it with {reply.ended!r}")
        if not reply.ended:
            raise self._lost(reply, "the stream ended without saying that the answer is complete")

    def _event(self, data: str, may_drop: Set[str]) -> dict[str, Any]:
        event = event_of(data)
        if event is None:
            raise refusals.garbage(self._engine, self.secret.hidden(data[:LONGEST_WORDS]))
        if event.get("error"):
            words, status = refusals.words(data, self.secret.hidden), refusals.status_in(event)
            if names := refusals.left_out(status, words, may_drop):
                raise _UnknownFieldsError(names)
            raise refusals.refused(self._engine, status, words)
        return event

    async def _refuse(self, response: aiohttp.ClientResponse, may_drop: Set[str]) -> None:
        """Raise the error for a status other than 200."""
        words = refusals.words(await beginning(_blocks(response)), self.secret.hidden)
        if response.status in BUSY:
            raise _TryAgainError(refusals.busy(self._engine, words), _seconds(response.headers.get("Retry-After", "")))
        if names := refusals.left_out(response.status, words, may_drop):
            raise _UnknownFieldsError(names)
        if 300 <= response.status < 400:
            raise refusals.redirected(self._engine, response.headers.get("Location", ""))
        raise refusals.refused(self._engine, response.status, words)

    def _problem(self, error: Exception, reply: Reply) -> Exception:
        """Return the error that a failure of the connection means."""
        import aiohttp

        words = refusals.words(str(error), self.secret.hidden) or type(error).__name__
        if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
            return refusals.unreachable(self._engine, words)
        if isinstance(error, asyncio.TimeoutError):
            return refusals.stalled(self._engine)
        if isinstance(error, (aiohttp.ClientResponseError, UnreadableError)):
            return refusals.garbage(self._engine, words)
        return self._lost(reply, f"the connection was lost: {words}")

    def _lost(self, reply: Reply, why: str) -> Exception:
        lost = refusals.broken_off(self._engine, why)
        return lost if reply.pieces else _TryAgainError(lost)

    def _redacted(self, error: EngineError) -> EngineError:
        """Take the key, in any form, out of the error's sentence: engines often repeat a key that they refuse."""
        error.args = (self.secret.hidden_sentence(str(error)),)
        return error


def _blocks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    return unpacked(response.content.iter_any(), response.headers.get("Content-Encoding", ""))


async def _at_most(tokens: int, blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the blocks of a stream; end early if it is longer than any answer of that many tokens."""
    left = _MOST_BYTES_BESIDE + _MOST_BYTES_PER_TOKEN * tokens
    async for block in blocks:
        yield block
        left -= len(block)
        if left < 0:
            return


def _seconds(retry_after: str) -> float:
    """Read the header Retry-After in seconds; 0 for a date, its other form, so that our own waits apply."""
    return float(retry_after) if re.fullmatch(r"\d{1,9}(\.\d+)?", retry_after) else 0.0
