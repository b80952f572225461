"""Sends a run's questions to an engine: vLLM, SGLang, or any other that takes OpenAI's chat completions.

No model is loaded here, so ComfyUI's memory manager has nothing to do with it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..log import log
from ..media import media
from ..media.content import convert
from ..models.engines import Engine
from ..models.families import family_of
from ..prompting.answer import NoAnswerError, why_no_answer
from ..prompting.batch import later_seed, run_seed
from ..prompting.watch import Reporter, Watch
from ..request import DecodeStats, LoadStats, Outcome, PromptStats, Question, Request, Sampling, Stats
from ..settings import AS_SET
from . import chat, kinds
from .answer import EngineAnswer
from .client import Wire
from .loop import Loop
from .refusals import EngineError, QuestionError
from .reply import Reply
from .thoughts import Thoughts

# Seconds between two looks at a cancel while nothing comes.
POLL_S = 0.1
# Questions that are packed while others are under way, so that the engine need not wait for them.
PACKED_AHEAD = 2
# Value in Stats for everything that the engine decides itself.
ENGINES_OWN = "engine"


class EngineSession:
    """One run with an engine: the questions that are under way, and the answers so far.

    An engine makes batches by itself, so all questions are one batch: up to max_concurrency are under way at a time,
    and answers come as they are ready.

    Args:
        began: when the run began, on time.perf_counter()'s clock.
        most: most questions at a time; None for the engine's max_concurrency.
    """

    def __init__(self, engine: Engine, request: Request, watch: Watch, began: float, most: int | None) -> None:
        self._began = began
        self._engine = engine
        self._request = request
        self._watch = watch
        as_set = request.sampling_from == AS_SET
        # The model's own settings may sample at random, whatever is set here.
        self._seed = run_seed(request.sampling if as_set else Sampling(seed=request.sampling.seed))
        self._most = min(engine.max_concurrency, most or engine.max_concurrency)
        self._places = asyncio.Semaphore(self._most)
        self._videos: Sequence[media.Video] = ()
        # Set whenever an answer has grown or ended.
        self._news = threading.Event()
        self._running: dict[Future[None], tuple[int, EngineAnswer]] = {}
        self._done: list[EngineAnswer] = []
        self._sizes: dict[int, tuple[tuple[int, int], ...]] = {}
        self._sent: dict[str, Any] = {}
        self._now = self._at_once = 0
        # The error that ended the run. Nothing more is sent after it.
        self._fatal: EngineError | None = None
        self._loop = Loop()
        self._wire = Wire(engine, _key(engine))
        self._thoughts = Thoughts(engine, self._wire, request.thinking)
        self._finding_kind = asyncio.Lock()

    def __enter__(self) -> EngineSession:
        self._loop.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Close the connections."""
        self._loop.cancel()
        self._loop.run(self._wire.close())
        self._loop.__exit__(*error)

    def load(self, first: Question, expected: int) -> None:
        """Read the videos, and convert the first question's pictures. No model is loaded here."""
        convert(first.pictures, (), self._watch.check)
        self._videos = media.videos(self._request, self._watch.check)
        self._watch.check()
        self._watch.stage("asking", model=self._request.load.model)

    def encode(self, questions: Iterable[Question]) -> Iterator[Iterable[Question]]:
        """Pass the questions on: each is packed when it is sent."""
        yield questions

    def generate(self, batch: Iterable[Question], reporter: Reporter) -> Iterator[Outcome]:
        """Send every question, and yield its answer or its error.

        Raises:
            EngineError: the engine cannot be used.
        """
        for question in batch:
            if (question.pictures or self._videos) and not self._engine.vision:
                raise EngineError(f"{self._request.load.model} answers text only: vision is false in its entry.")
            while len(self._running) >= self._most + PACKED_AHEAD:
                yield from self._look(reporter)
            self._start(question)
        while self._running:
            yield from self._look(reporter)

    def _start(self, question: Question) -> None:
        """Begin to pack and send a question."""
        writer = EngineAnswer(self._engine, self._request, self._wire.secret)
        if sizes := chat.seen_sizes(self._engine, self._request, question.pictures):
            self._sizes[question.number] = sizes
        future = self._loop.start(self._ask(writer, question))
        self._running[future] = (question.number, writer)
        future.add_done_callback(self._heard)

    def _heard(self, _: object) -> None:
        self._news.set()

    def _grown(self, writer: EngineAnswer, reply: Reply) -> None:
        writer.reply = reply
        self._news.set()

    async def _ask(self, writer: EngineAnswer, question: Question) -> None:
        parts = []
        packing = chat.shown(self._engine, self._request, question.pictures, self._videos)
        # One picture at a time, so that a cancel need not wait for all of them.
        while part := await asyncio.to_thread(next, packing, None):
            parts.append(part)
        number = question.number
        del question, packing  # frees the pictures before the answer comes
        body = self._sent = chat.body(self._engine, self._request, later_seed(self._seed, number), parts)
        async with self._places:
            if self._fatal:
                raise self._fatal
            self._now += 1
            self._at_once = max(self._at_once, self._now)
            try:
                writer.reply = await self._wire.complete(body, chat.MAY_DROP, partial(self._grown, writer))
                if self._request.thinking != "on":
                    writer.opened = await self._thoughts.opened(writer.reply, body)
                await self._find_kind(body)
            except EngineError as error:
                if not isinstance(error, QuestionError):
                    self._fatal = error
                raise
            finally:
                self._now -= 1

    async def _find_kind(self, body: dict[str, Any]) -> None:
        """Find out the engine's kind, once, if it may have ignored a parameter."""
        async with self._finding_kind:
            if chat.doubtful(body, self._wire.unknown) and kinds.known(self._engine) is None:
                await self._wire.find_kind()

    def _look(self, reporter: Reporter) -> Iterator[Outcome]:
        """Wait for news for at most POLL_S; then report it, and yield what is finished.

        Raises:
            EngineError: the engine failed in a way that concerns every question.
        """
        self._news.wait(POLL_S)
        self._news.clear()
        done = [future for future in self._running if future.done()]
        self._watch.check()
        if grown := [writer for _, writer in self._running.values() if writer.reply.pieces]:
            reporter.update(grown)
        for future in done:
            number, writer = self._running.pop(future)
            error = future.exception()
            if isinstance(error, (QuestionError, media.MediaError)):
                yield Outcome(number, error)
            elif error is not None:
                raise error
            else:
                self._done.append(writer)
                yield Outcome(number, writer.end() or self._why_no_answer(writer))

    def _why_no_answer(self, writer: EngineAnswer) -> NoAnswerError:
        if not writer.is_empty:
            return why_no_answer(self._request)
        return NoAnswerError(
            f"{self._request.load.model} used up {self._request.sampling.longest} tokens, and the engine sent no text: "
            "it may keep to itself what a model thinks. Raise max_new_tokens, or set thinking to off."
        )

    def stats(self) -> Stats:
        stats = Stats(
            loaded=self._loaded(),
            prompt=self._prompt_stats(),
            decode=self._decode_stats(),
            peak_bytes=0,
            total_s=time.perf_counter() - self._began,
        )
        for sentence in stats.loaded.fallbacks:
            log.warning("%s: %s", self._request.load.model, sentence)
        if self._request.diagnostics != "off":
            log.info("%s", stats)
        return stats

    def _loaded(self) -> LoadStats:
        fallbacks = chat.without_effect(self._request, self._sent, self._wire.unknown, kinds.known(self._engine) or "")
        if any(not writer.reply.usage for writer in self._done):
            fallbacks.append("the engine does not count its tokens: the figures count the pieces it sent")
        return LoadStats(
            model=self._request.load.model,
            device=f"{ENGINES_OWN} at {self._engine.place}",
            dtype=ENGINES_OWN,
            quantization=ENGINES_OWN,
            attention=ENGINES_OWN,
            decode_attention=ENGINES_OWN,
            fallbacks=tuple(fallbacks),
            load_s=0.0,
        )

    def _prompt_stats(self) -> PromptStats:
        """Return the engine's own counts, if it sends them. Times are measured here, so they include the network."""
        replies = [writer.reply for writer in self._done]
        start = self._began
        return PromptStats(
            prompt_tokens=sum(reply.count("prompt_tokens") for reply in replies),
            reused_tokens=sum(reply.cached for reply in replies),
            first_token_s=self._first(start) - start,
            prefill_s=sum(reply.first_s - reply.sent_s for reply in replies if reply.pieces),
            coordinates=family_of(self._engine.family).coordinates,
            seen_sizes=tuple(self._sizes[number] for number in sorted(self._sizes)),
        )

    def _decode_stats(self) -> DecodeStats:
        """Return the figures of all answers. Tokens per second are those of all questions together."""
        first = self._first(self._began)
        decode_s = max((writer.reply.last_s for writer in self._done if writer.reply.pieces), default=first) - first
        steps = sum(max(0, writer.tokens - 1) for writer in self._done)
        return DecodeStats(
            answers=len(self._done),
            batch_size=self._at_once,
            new_tokens=sum(writer.tokens for writer in self._done),
            decode_tokens_per_s=steps / decode_s if steps and decode_s > 0 else 0.0,
            thoughts_cut=0,
            tier=ENGINES_OWN,
            tier_reason="",
            sampling=self._request.sampling,
            sampling_from=self._request.sampling_from,
            seed=self._seed,
        )

    def _first(self, otherwise: float) -> float:
        """Return when the first piece of any answer came, or `otherwise` if none came."""
        return min((writer.reply.first_s for writer in self._done if writer.reply.pieces), default=otherwise)


def _key(engine: Engine) -> str:
    """Read the engine's key. That is done in every run, so that no object keeps the key for longer.

    Raises:
        EngineError: the variable that the entry names is not set, or holds something that cannot be a key.
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
