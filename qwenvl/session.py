"""Sessions answer the questions of a run: with a model on this machine, or through an engine elsewhere."""

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
from .media.content import Film, convert, outlines
from .models import catalog
from .models.families import family_of
from .prompting import prompt
from .prompting.answer import Writer, why_no_answer
from .prompting.batch import AFTER_A_CUT, MOST_ROWS, BatchLimit, later_seed, run_seed
from .prompting.prompt import Prompt, media_of, side_by_side
from .prompting.watch import Reporter, TokenListener, Watch
from .remote.session import EngineSession
from .report.diagnostics import Diagnosis
from .report.findings import family_report
from .request import DecodeStats, Outcome, PromptStats, Question, Request, Stats
from .settings import RELEASES

_, AFTER_THE_PROMPT, AFTER_THE_NODE = RELEASES


class Session(Protocol):
    """What answers the questions of one run. The type of a batch is up to the session."""

    def load(self, first: Question, expected: int) -> None:
        """Prepare for about `expected` questions, of which the first is given."""

    def encode(self, questions: Iterable[Question]) -> Iterator[Any]:
        """Yield batches of encoded questions, each as large as can be answered at a time."""

    def generate(self, batch: Any, reporter: Reporter) -> Iterator[Outcome]:
        """Answer a batch, report every token, and yield the outcome of each question as soon as it is known."""

    def stats(self) -> Stats:
        """Return the figures of the whole run."""


@contextmanager
def opened(
    request: Request, models: ModelCache, watch: Watch, diagnosis: Diagnosis, most: int | None = None
) -> Iterator[Session]:
    """Context manager that opens a session with the model or engine that the request names.

    Args:
        diagnosis: collects the figures of the run.
        most: the most questions at a time; None takes what fits.
    """
    if engine := catalog.engine(request.load.model):
        with EngineSession(engine, request, watch, diagnosis.began, most) as elsewhere:
            yield elsewhere
        return
    try:
        # The session ends first and drops the model: at its end, the turn may unload it.
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
    """A session with a model on this machine, and what the run measures; `most` questions at a time."""

    def __init__(self, request: Request, models: ModelCache, watch: Watch, diagnosis: Diagnosis, most: int) -> None:
        self._diagnosis = diagnosis
        self._request = request
        self._models = models
        self._watch = watch
        self._most = most
        self._videos: Sequence[Film] = ()
        self._model: ModelHandle | None = None
        # Contexts entered once the model is loaded, left after the last token.
        self._around = ExitStack()
        self._load_s = self._first_token_s = 0.0
        self._generations: list[Generation] = []
        self._seen_sizes: list[tuple[tuple[int, int], ...]] = []
        self._answers = self._batch_size = self._prompt_tokens = self._new_tokens = self._thoughts_cut = 0

    def __enter__(self) -> ModelSession:
        return self

    def __exit__(self, *error: Any) -> None:
        """Drop the model."""
        model, self._model = self._model, None
        self._around.__exit__(*error)
        if model is not None and self._batch_size > 1:
            # Buffers for many rows are too large to keep.
            model.decoder.drop_buffers()

    @property
    def _handle(self) -> ModelHandle:
        if self._model is None:
            raise RuntimeError("no model is loaded yet")
        return self._model

    def load(self, first: Question, expected: int) -> None:
        with self._diagnosis.phases("media"):
            self._videos = media.shown_videos(self._request, self._watch.check)
            if self._request.load not in self._models.held:
                # What cannot be shown is found before a model is loaded. One in memory may know the pictures already.
                convert(first.pictures, self._videos, self._watch.check)
        self._watch.check()
        start = time.perf_counter()
        asked, self._alone = self._request, expected == 1
        self._source = self._models.source(asked.load) or find_source(asked.load, self._watch, asked.download)
        self._request = self._source.sampled(asked)
        self._need = question_bytes(self._source, self._request, first.pictures, outlines(self._videos))
        if asked.load not in self._models.held:
            self._watch.stage("loading", model=asked.load.model, size=self._source.size())
        self._model = self._models.get(self._source, self._need * min(expected, self._most), self._watch.check)
        self._watch.stage("reading", pictures=len(first.pictures), videos=len(self._videos))
        self._load_s = time.perf_counter() - start
        self._seed = run_seed(self._request.sampling)
        family_report(self._model.family, family_of(self._model.family).linear_attention)
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
        """Answer in smaller parts if memory runs out; finished answers stay, failed ones are yielded as errors."""
        again = False
        while batch:
            part = batch[: self._limit.most]
            writers, failed = self._decode_or_recover(part, reporter)
            if failed:
                yield from failed
                numbers = {outcome.number for outcome in failed}
                batch = [asked for asked in batch if asked.number not in numbers]
            elif writers is not None:
                for asked, writer in zip(part, writers, strict=True):
                    yield Outcome(asked.number, writer.end() or why_no_answer(self._request))
                batch, again = batch[len(part) :], False
            elif len(part) > 1:
                self._limit.halve(len(part))
            else:
                self._free_memory(again)
                again = True

    def _decode_or_recover(self, part: list[Prompt], reporter: Reporter) -> tuple[list[Writer] | None, list[Outcome]]:
        """Decode, in float32 if float16 overflows. Returns the writers, None if memory ran out, and an error for each
        prompt that gives NaN or infinity, after which the others have to be tried again."""
        try:
            return self._decode(part, reporter), []
        except NotFiniteError as error:
            traceback.clear_frames(error.__traceback__)
            unsound = NotFiniteError(error.rows, error.token)
        if self._have_float32():
            return self._decode_or_recover(part, reporter)
        whys = why_not_finite(self._handle, unsound, len(part))
        if not self._generations and len(whys) == len(part):
            raise whys[0]  # all fail, so the model is at fault, not a picture
        return None, [Outcome(part[row].number, why) for row, why in zip(unsound.rows, whys, strict=True)]

    def _have_float32(self) -> bool:
        """Load the model again in float32 if it is in float16 and float32 fits; False if not."""
        start, spec = time.perf_counter(), self._request.load
        wider = in_float32(self._source, self._handle)
        if wider is None or not has_room(self._models, self._source, wider, 2 * self._need):
            return False
        # Drop every reference to the model before it is unloaded.
        self._around.close()
        self._model = None
        self._models.forget(spec)
        self._source, self._need = wider, 2 * self._need
        self._model = self._models.get(wider, self._need, self._watch.check)
        self._load_s += time.perf_counter() - start
        self._begin()
        return True

    def _decode(self, prompts: list[Prompt], reporter: Reporter) -> list[Writer] | None:
        """Answer the prompts side by side; None if memory ran out, with everything that was allocated freed."""
        started, sampling, model = time.perf_counter(), self._request.sampling, self._handle
        writers = [Writer(model.tokenizer, asked.thinks, sampling) for asked in prompts]
        try:
            generations = self._run_decoder(prompts, writers, reporter)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            model.decoder.drop_buffers()
            return None
        if not self._generations:
            self._first_token_s = started - self._diagnosis.began - self._load_s + generations[0].prefill_s
        self._generations += generations
        self._answers += len(prompts)
        self._batch_size = max(self._batch_size, len(prompts))
        self._prompt_tokens += sum(asked.tokens for asked in prompts)
        self._new_tokens += sum(writer.tokens for writer in writers)
        self._seen_sizes += [asked.sizes for asked in prompts]
        self._thoughts_cut += sum(len(later.rows) for later in generations[1:])
        return writers

    def _run_decoder(self, prompts: list[Prompt], writers: list[Writer], reporter: Reporter) -> list[Generation]:
        """Generate for all prompts, and once more for those whose thoughts the budget cut short."""
        sampling, seed = self._request.sampling, later_seed(self._seed, prompts[0].number)
        both = replace(sampling, max_new_tokens=sampling.longest)
        hear = TokenListener(writers, writers, reporter)
        decoder, check, dtype = self._handle.decoder, self._watch.check, self._handle.model.dtype
        first = decoder.generate(side_by_side(prompts, dtype), both, seed, hear, check, media_of(prompts))
        if cut := [row for row, writer in enumerate(writers) if writer.over_budget]:
            # For a single row, prompt and thought are still in the cache.
            longer = [prompts[row].continued([*first.rows[row], *writers[row].close_thought()]) for row in cut]
            rest = replace(sampling, min_new_tokens=max(0, sampling.min_new_tokens - sampling.thinking_budget))
            hear = TokenListener([writers[row] for row in cut], writers, reporter)
            seed = later_seed(seed, AFTER_A_CUT)
            return [first, decoder.generate(side_by_side(longer, dtype), rest, seed, hear, check, media_of(longer))]
        return [first]

    def stats(self) -> Stats:
        self._around.close()
        model, request, generations = self._handle, self._request, self._generations
        no_effect = [reason] if (reason := prompt.why_no_switch(model, request)) else []
        for sentence in no_effect:
            log.warning("%s", sentence)
        stats = Stats(
            loaded=load_stats(model, self._load_s, no_effect),
            prompt=PromptStats(
                prompt_tokens=self._prompt_tokens,
                reused_tokens=generations[0].reused_tokens,
                first_token_s=self._first_token_s,
                prefill_s=sum(generation.prefill_s for generation in generations),
                coordinates=family_of(model.family).coordinates,
                seen_sizes=tuple(self._seen_sizes),
            ),
            decode=self._decode_stats(),
            peak_bytes=peak_bytes(model.machine.device),
            total_s=time.perf_counter() - self._diagnosis.began,
        )
        return self._diagnosis.finish(stats, generations, request.load)

    def _decode_stats(self) -> DecodeStats:
        steps = sum(generation.steps for generation in self._generations)
        decode_s = sum(generation.decode_s for generation in self._generations)
        return DecodeStats(
            answers=self._answers,
            batch_size=self._batch_size,
            new_tokens=self._new_tokens,
            decode_tokens_per_s=steps / decode_s if steps and decode_s > 0 else 0.0,
            thoughts_cut=self._thoughts_cut,
            tier=self._generations[0].tier,
            tier_reason=self._generations[0].tier_reason,
            sampling=self._request.sampling,
            sampling_from=self._request.sampling_from,
            seed=self._seed,
        )

    def _free_memory(self, again: bool) -> None:
        """Free the memory of other models when not even one answer fits; raise if that was tried already."""
        if again:
            raise self._source.out_of_memory("answer", self._need)
        self._models.free_memory(self._request.load, self._need)
