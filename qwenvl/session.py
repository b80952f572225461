"""Whom questions are put to: a model here, or an engine elsewhere that is asked in the same way."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from .comfyui import host
from .decoding.rows import Generation
from .errors import NotFiniteError
from .faults import ran_out, retry_with_memory
from .loading.cache import ModelCache
from .loading.devices import current, peak_bytes, reset_peak
from .loading.loader import ModelHandle
from .loading.overflow import has_room, in_float32, why_not_finite
from .loading.source import find_source, load_stats, question_bytes
from .log import log
from .media import media
from .models import catalog
from .models.families import family_of
from .prompting import prompt
from .prompting.answer import Writer, why_no_answer
from .prompting.batch import AFTER_A_CUT, MOST_ROWS, BatchLimit, later_seed, run_seed
from .prompting.prompt import Prompt, media_of, side_by_side
from .prompting.watch import Reporter, TokenListener, Watch
from .remote.session import EngineSession
from .report.diagnostics import Diagnosis
from .report.findings import tell_of
from .request import DecodeStats, Outcome, PromptStats, Question, Request, Stats
from .settings import RELEASES

_, AFTER_THE_PROMPT, AFTER_THE_NODE = RELEASES


class Session(Protocol):
    """Whom the questions of one run are put to. Batch is its own affair: what encode makes and generate takes."""

    def load(self, first: Question, expected: int) -> None:
        """Make ready for about so many questions, of which the first is there."""

    def encode(self, questions: Iterable[Question]) -> Iterator[Any]:
        """The questions as the other side takes them, as many at a time as it can answer."""

    def generate(self, batch: Any, reporter: Reporter) -> Iterator[Outcome]:
        """Ask them, tell of every token, and give what came of each question as soon as it is known."""

    def stats(self) -> Stats:
        """The figures of all that was asked."""


@contextmanager
def opened(
    request: Request, models: ModelCache, watch: Watch, diagnosis: Diagnosis, most: int | None = None
) -> Iterator[Session]:
    """Within the block, questions can be put to the model or engine that the request names.

    Args:
        diagnosis: of the run.
        most: questions at a time; None takes what fits.
    """
    if engine := catalog.engine(request.load.model):
        with EngineSession(engine, request, watch, diagnosis.began, most) as elsewhere:
            yield elsewhere
        return
    try:
        # The session ends first and holds the model no longer: the turn may end with the model gone.
        with (
            models.turn(request.load, request.release != AFTER_THE_NODE, watch.check),
            ModelSession(request, models, watch, diagnosis, most or MOST_ROWS) as here,
        ):
            yield here
    finally:
        if request.release == AFTER_THE_PROMPT:
            forget = partial(models.forget, request.load, unless_used_after=time.monotonic())
            host.when_prompt_ends(("release", request.load), forget)


class ModelSession:
    """A model on this machine, with all that one run measures of it.

    Args:
        most: questions at a time.
    """

    def __init__(self, request: Request, models: ModelCache, watch: Watch, diagnosis: Diagnosis, most: int) -> None:
        self._diagnosis = diagnosis
        self._request = request
        self._models = models
        self._watch = watch
        self._most = most
        self._videos: Sequence[media.Video] = ()
        self._model: ModelHandle | None = None
        # What is begun once the model is there and ends with the last token.
        self._around = ExitStack()
        self._load_s = self._first_token_s = 0.0
        self._made: list[Generation] = []
        self._seen_sizes: list[tuple[tuple[int, int], ...]] = []
        self._answers = self._batch_size = self._prompt_tokens = self._new_tokens = self._thoughts_cut = 0

    def __enter__(self) -> ModelSession:
        return self

    def __exit__(self, *error: Any) -> None:
        """Hold the model no longer."""
        model, self._model = self._model, None
        self._around.__exit__(*error)
        if model is not None and self._batch_size > 1:
            # Made for many rows, its buffers are too large to keep.
            model.decoder.drop_buffers()

    @property
    def _handle(self) -> ModelHandle:
        if self._model is None:
            raise RuntimeError("no model is loaded yet")
        return self._model

    def load(self, first: Question, expected: int) -> None:
        with self._diagnosis.phases("media"):
            self._videos = media.videos(self._request, self._watch.check)
        self._watch.check()
        start = time.perf_counter()
        asked, self._alone = self._request, expected == 1
        self._source = self._models.source(asked.load) or find_source(asked.load, self._watch, asked.download)
        self._request = self._source.sampled(asked)
        self._need = question_bytes(self._source, self._request, first.pictures, self._videos)
        if asked.load not in self._models.held:
            self._watch.stage("loading", model=asked.load.model, size=self._source.size())
        self._model = self._models.get(self._source, self._need * min(expected, self._most), self._watch.check)
        self._watch.stage("reading", pictures=len(first.pictures), videos=len(self._videos))
        self._load_s = time.perf_counter() - start
        self._seed = run_seed(self._request.sampling)
        tell_of(self._model.family, family_of(self._model.family).linear_attention)
        self._watch.check()
        self._begin()

    def _begin(self) -> None:
        model, sampling = self._handle, self._request.sampling
        device = model.machine.device
        self._limit = BatchLimit(host.free_bytes(device), self._source.request_bytes, sampling.longest, self._most)
        reset_peak(device)
        self._around.enter_context(self._diagnosis.watching(model.model))
        self._around.enter_context(current(device))

    def encode(self, questions: Iterable[Question]) -> Iterator[list[Prompt]]:
        batch: list[Prompt] = []
        for question in questions:
            encoded = self._encode(question)
            del question  # its pictures need not wait for the answers
            if batch and not self._limit.fits([*batch, encoded]):
                yield batch
                batch = []
            batch.append(encoded)
            if len(batch) >= self._limit.most:
                yield batch
                batch = []
        if batch:
            yield batch

    def _encode(self, question: Question) -> Prompt:
        shown = (question.pictures, self._videos, self._diagnosis.phases, question.number, self._alone)
        work = partial(prompt.encode, self._handle, self._request, *shown, self._watch.check)
        return retry_with_memory(work, self._handle.decoder.drop_buffers, self._free_memory)

    def generate(self, batch: list[Prompt], reporter: Reporter) -> Iterator[Outcome]:
        """In parts where memory runs out; what is finished stays finished, and what cannot be computed is left out."""
        again = False
        while batch:
            part = batch[: self._limit.most]
            writers, failed = self._decode_or_recover(part, reporter)
            if failed:
                yield from failed
                numbers = {each.number for each in failed}
                batch = [each for each in batch if each.number not in numbers]
            elif writers is not None:
                for each, writer in zip(part, writers, strict=True):
                    yield Outcome(each.number, writer.end() or why_no_answer(self._request))
                batch, again = batch[len(part) :], False
            elif len(part) > 1:
                self._limit.halve(len(part))
            else:
                self._free_memory(again)
                again = True

    def _decode_or_recover(self, part: list[Prompt], reporter: Reporter) -> tuple[list[Writer] | None, list[Outcome]]:
        """The answers, in float32 where float16 overflows, or None where memory ran out; and an error for each prompt
        for which no numbers can be computed, after which the others are to be tried again."""
        try:
            return self._decode(part, reporter), []
        except NotFiniteError as error:
            traceback.clear_frames(error.__traceback__)
            unsound = NotFiniteError(error.rows, error.token)
        if self._have_float32():
            return self._decode_or_recover(part, reporter)
        whys = why_not_finite(self._handle, unsound, len(part))
        if not self._made and len(whys) == len(part):
            raise whys[0]  # it is the model's fault, not that of a picture
        return None, [Outcome(part[row].number, why) for row, why in zip(unsound.rows, whys, strict=True)]

    def _have_float32(self) -> bool:
        """Load the model anew in float32, if it was in float16 and there is room for it; whether it was."""
        start, spec = time.perf_counter(), self._request.load
        wider = in_float32(self._source, self._handle)
        if wider is None or not has_room(self._models, self._source, wider, 2 * self._need):
            return False
        # Nobody may hold the model when it goes.
        self._around.close()
        self._model = None
        self._models.forget(spec)
        self._source, self._need = wider, 2 * self._need
        self._model = self._models.get(wider, self._need, self._watch.check)
        self._load_s += time.perf_counter() - start
        self._begin()
        return True

    def _decode(self, prompts: list[Prompt], reporter: Reporter) -> list[Writer] | None:
        """The answers of the prompts, side by side; None where memory ran out, with all that was made given back."""
        started, sampling, model = time.perf_counter(), self._request.sampling, self._handle
        writers = [Writer(model.tokenizer, each.thinks, sampling) for each in prompts]
        try:
            made = self._run_decoder(prompts, writers, reporter)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            model.decoder.drop_buffers()
            return None
        if not self._made:
            self._first_token_s = started - self._diagnosis.began - self._load_s + made[0].prefill_s
        self._made += made
        self._answers += len(prompts)
        self._batch_size = max(self._batch_size, len(prompts))
        self._prompt_tokens += sum(each.tokens for each in prompts)
        self._new_tokens += sum(writer.tokens for writer in writers)
        self._seen_sizes += [each.sizes for each in prompts]
        self._thoughts_cut += sum(len(each.rows) for each in made[1:])
        return writers

    def _run_decoder(self, prompts: list[Prompt], writers: list[Writer], reporter: Reporter) -> list[Generation]:
        """One of all prompts, and one more of those whose thoughts were cut short."""
        sampling, seed = self._request.sampling, later_seed(self._seed, prompts[0].number)
        both = replace(sampling, max_new_tokens=sampling.longest)
        hear = TokenListener(writers, writers, reporter)
        decoder, check, dtype = self._handle.decoder, self._watch.check, self._handle.model.dtype
        made = [decoder.generate(side_by_side(prompts, dtype), both, seed, hear, check, media_of(prompts))]
        if cut := [row for row, writer in enumerate(writers) if writer.over_budget]:
            # A single row finds its prompt and its thought in memory still.
            longer = [prompts[row].continued([*made[0].rows[row], *writers[row].close_thought()]) for row in cut]
            rest = replace(sampling, min_new_tokens=max(0, sampling.min_new_tokens - sampling.thinking_budget))
            hear = TokenListener([writers[row] for row in cut], writers, reporter)
            seed = later_seed(seed, AFTER_A_CUT)
            made.append(decoder.generate(side_by_side(longer, dtype), rest, seed, hear, check, media_of(longer)))
        return made

    def stats(self) -> Stats:
        self._around.close()
        model, request, made = self._handle, self._request, self._made
        no_effect = [reason] if (reason := prompt.why_no_switch(model, request)) else []
        for sentence in no_effect:
            log.warning("%s", sentence)
        stats = Stats(
            loaded=load_stats(model, self._load_s, no_effect),
            prompt=PromptStats(
                prompt_tokens=self._prompt_tokens,
                reused_tokens=made[0].reused_tokens,
                first_token_s=self._first_token_s,
                prefill_s=sum(each.prefill_s for each in made),
                coordinates=family_of(model.family).coordinates,
                seen_sizes=tuple(self._seen_sizes),
            ),
            decode=self._decode_stats(),
            peak_bytes=peak_bytes(model.machine.device),
            total_s=time.perf_counter() - self._diagnosis.began,
        )
        return self._diagnosis.finish(stats, made, request.load)

    def _decode_stats(self) -> DecodeStats:
        made = self._made
        steps, decode_s = sum(each.steps for each in made), sum(each.decode_s for each in made)
        return DecodeStats(
            answers=self._answers,
            batch_size=self._batch_size,
            new_tokens=self._new_tokens,
            decode_tokens_per_s=steps / decode_s if steps and decode_s > 0 else 0.0,
            thoughts_cut=self._thoughts_cut,
            tier=made[0].tier,
            tier_reason=made[0].tier_reason,
            sampling=self._request.sampling,
            sampling_from=self._request.sampling_from,
            seed=self._seed,
        )

    def _free_memory(self, again: bool) -> None:
        """Where not even one answer fits: free what others hold, or raise if that was tried already."""
        if again:
            raise self._source.out_of_memory("answer", self._need)
        self._models.free_memory(self._request.load, self._need)
