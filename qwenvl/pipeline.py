"""START HERE: questions from request to result, in five steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import length_hint
from typing import Any

from PIL import Image

from . import catalog, host, media, prompt, remote
from .answer import Writer
from .batch import MOST_ROWS, Batches, Room, read_ahead, run_seed
from .budget import prompt_tokens
from .cache import ModelCache
from .devices import current, peak_bytes, reset_peak
from .diagnostics import Diagnosis
from .faults import with_room
from .keyvalues import capacity_for
from .loader import PICTURE_PIXELS, ModelHandle
from .log import log
from .report import tell_of
from .request import Answer, Request, Result, Stats
from .settings import IMAGE_MODES, RELEASES, RESOLUTIONS
from .source import ModelSource, find_source
from .watch import Watch

_, AFTER_THE_PROMPT, AFTER_THE_NODE = RELEASES


class NoAnswerError(RuntimeError):
    """The model used up its tokens before it began to answer."""


def run(request: Request, models: ModelCache, watch: Watch) -> Result:
    """Answer one request: one question about everything, or the same question about each picture.

    Raises:
        ValueError, RuntimeError: the subclasses of media, catalog, download, loader, prompt and budget, which say
            what was asked, why it cannot be and what to do; and whatever watch raises to cancel.
    """
    answers: dict[int, Answer] = {}
    diagnosis = Diagnosis(request.diagnostics)

    def answer(ask: Ask) -> Stats | None:
        prompt.require_question(request)
        with diagnosis.phases("media"):
            pictures = media.pictures(request.images)
        each = request.image_mode != IMAGE_MODES[0] and bool(pictures)
        questions = [[picture] for picture in pictures] if each else [pictures]
        live = _Live(watch, len(questions) if each else None, single=not each)
        job = _Job(request, enumerate(questions), len(questions), live, diagnosis, answers.__setitem__, _raise)
        return ask(job)

    stats = _where_it_lives(request, models, watch, answer)
    result = Result(tuple(answers[index] for index in sorted(answers)), stats)
    watch.end("\n\n".join(each.text for each in result.answers))
    return result


def caption(
    request: Request,
    items: Iterable[tuple[str, Any]],
    models: ModelCache,
    watch: Watch,
    batch_size: int | None = None,
    done: Callable[[int, Answer], None] = lambda *_: None,
    failed: Callable[[int, Exception], None] = lambda *_: None,
) -> Stats | None:
    """Ask the request's question about each picture, several at a time, while the next ones are being read.

    Args:
        request: its images are not looked at; its videos are shown beside every picture.
        items: a name for messages, and a picture: a file's path, an IMAGE tensor, a PIL image, or a function that
            returns one of these and is called in another thread. May be any length, and is read as it is needed.
        batch_size: how many at a time; None takes what fits into the memory that is free.
        done: called in this thread with the index of an item and its answer, as soon as its batch is finished.
        failed: the same with the error of a picture that cannot be read or was not answered, which is left out.

    Returns:
        The figures of all of it; None where there was nothing to answer.
    """
    total = length_hint(items) or None
    expected = batch_size or MOST_ROWS

    def answer(ask: Ask) -> Stats | None:
        with closing(read_ahead(items, depth=2 * expected)) as questions:
            live, diagnosis = _Live(watch, total), Diagnosis(request.diagnostics)
            return ask(_Job(request, questions, expected, live, diagnosis, done, failed, batch_size))

    return _where_it_lives(request, models, watch, answer)


@dataclass(slots=True)
class _Job:
    """What is asked about which pictures, and who is told."""

    request: Request
    # Each with its index, and with the error in place of pictures that cannot be read.
    questions: Iterable[tuple[int, list[Image.Image] | Exception]]
    # How many there are, as far as memory is concerned.
    expected: int
    live: _Live
    diagnosis: Diagnosis
    done: Callable[[int, Answer], None]
    failed: Callable[[int, Exception], None]
    # At a time; None is as many as there is room for.
    most: int | None = None

    @property
    def rows(self) -> int:
        """The most that a model here answers at a time."""
        return self.most or MOST_ROWS

    def readable(self) -> Iterator[tuple[int, list[Image.Image]]]:
        """The questions that can be asked; the others are told of."""
        for index, pictures in self.questions:
            if isinstance(pictures, Exception):
                self.failed(index, pictures)
            else:
                yield index, pictures

    def tell(self, answers: Sequence[tuple[int, Answer | None]]) -> None:
        """Of a batch that is finished."""
        for index, answer in answers:
            if answer is None:
                self.failed(index, NoAnswerError(_no_answer(self.request)))
            else:
                self.done(index, answer)
        self.live.finished([answer for _, answer in answers])


class _Live:
    """Tells a watch how far the answers are."""

    def __init__(self, watch: Watch, total: int | None, single: bool = False) -> None:
        self.watch = watch
        self._total = total
        self._single = single
        self._done = 0
        self._latest = ""

    def look(self, writers: Sequence[Writer]) -> None:
        """After every token."""
        if self._single:
            (writer,) = writers
            so_far = writer.so_far
            self.watch.update(writer.tokens, so_far.text, so_far.thinking)
            return
        ended = [writer for writer in writers if writer.ended and not writer.over_budget]
        latest = ended[-1].so_far.text if ended else self._latest or writers[0].so_far.text
        self.watch.advance(self._done + len(ended), self._total, latest)

    def finished(self, answers: Sequence[Answer | None]) -> None:
        """After a batch."""
        self._done += len(answers)
        self._latest = next((each.text for each in reversed(answers) if each), self._latest)


Ask = Callable[[_Job], "Stats | None"]


def _where_it_lives(request: Request, models: ModelCache, watch: Watch, work: Callable[[Ask], Any]) -> Any:
    """Do the work with an engine, or with a model here."""
    engine = catalog.engine(request.load.model)
    if engine:
        return work(lambda job: remote.answer(engine, job))
    return _in_turn(request, models, watch, lambda: work(lambda job: _answer(job, models)))


def _in_turn(request: Request, models: ModelCache, watch: Watch, work: Callable[[], Any]) -> Any:
    """Do the work with the models to ourselves, and let the request's go when it says."""
    # The frame that holds the model is the work's, and it has ended when the turn gives the memory back.
    with models.turn(request.load, request.release != AFTER_THE_NODE, watch.check):
        result = work()
    if request.release == AFTER_THE_PROMPT:
        used_at = time.monotonic()
        host.when_prompt_ends(lambda: models.forget(request.load, unless_used_after=used_at))
    return result


def _answer(job: _Job, models: ModelCache) -> Stats | None:
    """The five steps: look, load, encode, generate, tell."""
    start, request, check = job.diagnosis.began, job.request, job.live.watch.check
    with job.diagnosis.phases("media"):
        videos = media.videos(request)
    questions = job.readable()
    first = next(questions, None)
    if first is None:
        return None
    check()

    before_load = time.perf_counter()
    source = models.source(request.load) or find_source(request.load, job.live.watch, request.download)
    request = source.sampled(request)
    need = _bytes_of(source, request, first[1], videos)
    model = models.get(source, need * min(job.expected, job.rows))
    load_s = time.perf_counter() - before_load
    tell_of(type(model.model.config).model_type)
    check()

    room = Room(host.free_bytes(model.machine.device), source.request_bytes, request.sampling.longest, job.rows)

    def out_of_memory(again: bool) -> None:
        if again:
            raise source.out_of_memory("answer", need)
        models.make_room(request.load, need)

    seed = run_seed(request.sampling)
    reset_peak(model.machine.device)
    batches = Batches(model, request.sampling, seed, room, out_of_memory)
    prompts = _encoded(model, job, chain([first], questions), videos, out_of_memory)
    prepared_s = time.perf_counter() - start - load_s
    with job.diagnosis.watching(model.model), current(model.machine.device):
        for finished in batches.answers(prompts, job.live.look, check):
            job.tell(finished)
    stats = Stats(
        **_loaded(model, request),
        **batches.figures(),
        sampling=request.sampling,
        sampling_from=request.sampling_from,
        seed=seed,
        load_s=load_s,
        first_token_s=prepared_s + batches.first_token_s,
        peak_bytes=peak_bytes(model.machine.device),
        total_s=time.perf_counter() - start,
    )
    return job.diagnosis.finish(stats, batches.made, request.load)


def _bytes_of(
    source: ModelSource, request: Request, pictures: Sequence[Image.Image], videos: Sequence[media.Video]
) -> int:
    """What a question needs beside the weights, estimated before there is a model."""
    pixels = RESOLUTIONS[request.image_resolution] or PICTURE_PIXELS
    tokens = prompt_tokens(request.system + request.text, pictures, videos, pixels[1])
    # The buffer of keys and values has the size of a bucket, not of the text.
    return source.request_bytes(capacity_for(tokens + request.sampling.longest), tokens)


def _encoded(
    model: ModelHandle,
    job: _Job,
    questions: Iterable[tuple[int, list[Image.Image]]],
    videos: Sequence[media.Video],
    out_of_memory: Callable[[bool], None],
) -> Iterator[tuple[int, prompt.Prompt]]:
    for index, pictures in questions:
        encode = partial(prompt.encode, model, job.request, pictures, videos, job.diagnosis.phases)
        yield index, with_room(encode, model.decoder.drop_buffers, out_of_memory)


def _loaded(model: ModelHandle, request: Request) -> dict[str, Any]:
    """The statistics of the load."""
    no_switch = prompt.why_no_switch(model, request)
    if no_switch:
        log.warning("%s", no_switch)
    return {
        "model": model.spec.model,
        "device": ", ".join(model.machine.devices),
        "dtype": str(model.machine.dtype).removeprefix("torch."),
        "quantization": model.plan.quantization,
        "attention": model.plan.attention,
        "decode_attention": model.decoder.attention,
        "fallbacks": (*model.plan.fallbacks, *([no_switch] if no_switch else [])),
    }


def _no_answer(request: Request) -> str:
    return (
        f"{request.load.model} was still thinking after {request.sampling.longest} tokens, so there is no answer. "
        "Raise max_new_tokens, set a thinking_budget, or pick a model that does not think (Instruct)."
    )


def _raise(index: int, error: Exception) -> None:
    raise error
