"""The same questions put to an engine: vLLM, SGLang, or whatever else speaks OpenAI's chat completions.

Nothing of it is in memory here: no model is loaded, and ComfyUI's memory manager hears nothing of it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from PIL import Image

from . import chat, media
from .answer import THINK_END, THINK_START, cut_before, split_thinking
from .batch import later_seed, run_seed
from .checks import whole_characters
from .engines import Engine
from .log import log
from .loop import Loop
from .refusals import EngineError, QuestionError
from .reply import Reply
from .request import Answer, Request, Sampling, Stats
from .settings import AS_SET
from .wire import Wire

# How often a cancel is looked for while nothing comes.
POLL_S = 0.1
# Questions that are made ready while the others are under way, so that the engine need not wait for packing.
PACKED_AHEAD = 2
# What Stats says of things that are the engine's own affair.
ENGINES_OWN = "engine"


class Job(Protocol):
    """What is asked about which pictures, and who is told: the pipeline's."""

    request: Request
    live: Any
    diagnosis: Any
    most: int | None

    def readable(self) -> Iterator[tuple[int, list[Image.Image]]]: ...

    def failed(self, index: int, error: Exception, /) -> None: ...

    def tell(self, answers: Sequence[tuple[int, Answer | None]]) -> None: ...


class Writer:
    """One answer while it comes."""

    over_budget = False

    def __init__(self, engine: Engine, request: Request) -> None:
        self._stops = request.sampling.stop
        self._may_think = request.thinking != "off"
        # A template may have opened the think block, which nobody but the engine sees.
        self._thinks = request.thinking == "on" or (self._may_think and "thinking" in engine.model.lower())
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
        return Answer(cut_before(text or "", self._stops), thinking)

    def end(self) -> Answer | None:
        """The whole of it; None where the model only thought."""
        thinking, text = self._split()
        if text is None and self.reply.ended != "length" and not self.reply.text.lstrip().startswith(THINK_START):
            # It ended by itself and closed no block, so there was none.
            thinking, text = "", thinking
        if text is None or (thinking and not text):
            return None
        return Answer(cut_before(text, self._stops).strip(), thinking)

    def _split(self) -> tuple[str, str | None]:
        """(thinking, answer) as far as they have come."""
        # Only here: the halves of a character may come in two pieces.
        text, thinking = whole_characters(self.reply.text), whole_characters(self.reply.thinking)
        if thinking:
            return thinking.strip(), text.strip()
        closed = self._may_think and THINK_END in text
        return split_thinking(text, self._thinks or closed)


def answer(engine: Engine, job: Job) -> Stats | None:
    """Ask every question of the job, up to the engine's max_concurrency at a time; answers come as they are ready.

    Raises:
        EngineError: the engine cannot be used; it says why.
        Whatever the job and its watch raise to cancel: the connections are closed first.
    """
    wire = Wire(engine, _key(engine))
    videos = media.videos(job.request)
    job.live.watch.check()
    with Loop() as loop:
        asking = _Asking(engine, job, videos, wire, loop)
        try:
            asking.all()
        finally:
            loop.cancel()
            loop.run(wire.close())
    return asking.stats(job.diagnosis.began)


class _Asking:
    """The questions of one run: those under way, and what came of the others."""

    def __init__(self, engine: Engine, job: Job, videos: Sequence[media.Video], wire: Wire, loop: Loop) -> None:
        self._engine = engine
        self._job = job
        self._request = job.request
        self._videos = videos
        self._wire = wire
        self._loop = loop
        as_set = job.request.sampling_from == AS_SET
        # The model's own may be drawn at random whatever is set.
        self._seed = run_seed(job.request.sampling if as_set else Sampling(seed=job.request.sampling.seed))
        self._most = min(engine.max_concurrency, job.most or engine.max_concurrency)
        self._places = asyncio.Semaphore(self._most)
        # Set whenever there is something to look at.
        self._news = threading.Event()
        self._running: dict[Future[None], tuple[int, Writer]] = {}
        self._done: list[Writer] = []
        self._sent: dict[str, Any] = {}
        self._now = self._at_once = 0
        # What ended the run: nothing more is sent then.
        self._fatal: EngineError | None = None

    def all(self) -> None:
        """Put every question, and tell what comes of it."""
        for index, pictures in self._job.readable():
            if (pictures or self._videos) and not self._engine.vision:
                raise EngineError(f"{self._request.load.model} answers text only: vision is false in its entry.")
            while len(self._running) >= self._most + PACKED_AHEAD:
                self._look()
            self._start(index, pictures)
        while self._running:
            self._look()

    def _start(self, index: int, pictures: Sequence[Image.Image]) -> None:
        """Put a question on its way."""
        writer = Writer(self._engine, self._request)
        future = self._loop.start(self._ask(writer, index, pictures))
        self._running[future] = (index, writer)
        future.add_done_callback(lambda _: self._news.set())

    async def _ask(self, writer: Writer, index: int, pictures: Sequence[Image.Image]) -> None:
        parts = []
        packing = chat.shown(self._engine, self._request, pictures, self._videos)
        # A picture at a time, so that a cancel need not wait for all of them.
        while part := await asyncio.to_thread(next, packing, None):
            parts.append(part)
        body = self._sent = chat.body(self._engine, self._request, later_seed(self._seed, index), parts)

        def grown(reply: Reply) -> None:
            writer.reply = reply
            self._news.set()

        async with self._places:
            if self._fatal:
                raise self._fatal
            self._now += 1
            self._at_once = max(self._at_once, self._now)
            try:
                writer.reply = await self._wire.complete(body, chat.MAY_DROP, grown)
            except EngineError as error:
                if not isinstance(error, QuestionError):
                    self._fatal = error
                raise
            finally:
                self._now -= 1

    def _look(self) -> None:
        """Wait for news, but not for long; then tell it.

        Raises:
            EngineError: the engine failed in a way that concerns every question.
            Whatever the job and its watch raise.
        """
        self._news.wait(POLL_S)
        self._news.clear()
        done = [future for future in self._running if future.done()]
        self._job.live.watch.check()
        if grown := [writer for _, writer in self._running.values() if writer.reply.pieces]:
            self._job.live.look(grown)
        for future in done:
            index, writer = self._running.pop(future)
            error = future.exception()
            if isinstance(error, (QuestionError, media.MediaError)):
                self._job.failed(index, error)
            elif error is not None:
                raise error
            else:
                self._done.append(writer)
                self._job.tell([(index, writer.end())])

    def stats(self, start: float) -> Stats | None:
        """The figures; None where nothing was asked."""
        if not self._sent:
            return None
        stats = Stats(
            model=self._request.load.model,
            device=f"{ENGINES_OWN} at {self._engine.place}",
            dtype=ENGINES_OWN,
            quantization=ENGINES_OWN,
            attention=ENGINES_OWN,
            decode_attention=ENGINES_OWN,
            sampling=self._request.sampling,
            sampling_from=self._request.sampling_from,
            fallbacks=tuple(self._fallbacks()),
            batch_size=self._at_once,
            seed=self._seed,
            load_s=0.0,
            tier=ENGINES_OWN,
            tier_reason="",
            thoughts_cut=0,
            peak_bytes=0,
            total_s=time.perf_counter() - start,
            **self._counts(),
            **self._times(start),
        )
        for sentence in stats.fallbacks:
            log.warning("%s: %s", self._request.load.model, sentence)
        if self._request.diagnostics != "off":
            log.info("%s", stats)
        return stats

    def _fallbacks(self) -> list[str]:
        sentences = chat.without_effect(self._request, self._sent, self._wire.unknown)
        if any(not writer.reply.usage for writer in self._done):
            sentences.append("the engine does not count its tokens: the figures count the pieces it sent")
        return sentences

    def _counts(self) -> dict[str, Any]:
        """The engine's own numbers, where it tells them."""
        replies = [writer.reply for writer in self._done]
        return {
            "answers": len(self._done),
            "prompt_tokens": sum(reply.count("prompt_tokens") for reply in replies),
            "new_tokens": sum(writer.tokens for writer in self._done),
            "reused_tokens": sum(reply.cached for reply in replies),
        }

    def _times(self, start: float) -> dict[str, Any]:
        """Measured here, so the network is in them. Tokens per second are those of all questions together."""
        began = [writer.reply for writer in self._done if writer.reply.pieces]
        first = min((reply.first_s for reply in began), default=start)
        decode_s = max((reply.last_s for reply in began), default=first) - first
        steps = sum(max(0, writer.tokens - 1) for writer in self._done)
        return {
            "first_token_s": first - start,
            "prefill_s": sum(reply.first_s - reply.sent_s for reply in began),
            "decode_tokens_per_s": steps / decode_s if steps and decode_s > 0 else 0.0,
        }


def _key(engine: Engine) -> str:
    """Read at every run, and held by nothing that outlives it.

    Raises:
        EngineError: the entry names a variable, and there is none.
    """
    if not engine.api_key_env:
        return ""
    key = os.environ.get(engine.api_key_env, "").strip()
    if not key:
        raise EngineError(
            f"Engine {engine.name!r} needs a key, and the environment variable {engine.api_key_env} is not set. "
            "Set it for the process that runs this, and start that again."
        )
    if not (key.isascii() and key.isprintable()):
        raise EngineError(f"The environment variable {engine.api_key_env} holds characters that no key has.")
    return key
