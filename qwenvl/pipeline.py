"""START HERE: one question from request to result, in five steps."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from . import host, media, prompt
from .budget import is_out_of_memory, prompt_tokens
from .cache import ModelCache
from .loader import PICTURE_PIXELS, ModelHandle
from .log import log
from .request import IMAGE_MODES, RELEASES, Answer, Request, Result, Stats
from .rows import Generation
from .source import find_source

_, AFTER_THE_PROMPT, AFTER_THE_NODE = RELEASES


class NoAnswerError(RuntimeError):
    """The model used up its tokens before it began to answer."""


class Watch(Protocol):
    """Who looks on while an answer is made: ComfyUI's node, or the terminal."""

    def check(self) -> None:
        """Raise to cancel."""

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        """After every token: how many there are, the answer so far, and the thought before it. Raise to cancel."""

    def advance(self, done: int, total: int | None, text: str) -> None:
        """The same with many answers: how many are finished of how many (None: nobody knows), and the latest."""

    def end(self, text: str) -> None:
        """Once, with the final answer."""


def run(request: Request, models: ModelCache, watch: Watch) -> Result:
    """Answer one request: one question about everything, or the same question about each picture.

    Raises:
        ValueError, RuntimeError: the subclasses of media, catalog, download, loader, prompt and budget, which say
            what was asked, why it cannot be and what to do; and whatever watch raises to cancel.
    """
    if request.image_mode == IMAGE_MODES[0] or not request.images:
        return _in_turn(request, models, lambda: _answer(request, models, watch))
    answers: dict[int, Answer] = {}

    def stop(index: int, error: Exception) -> None:
        raise error

    pictures = media.pictures(request.images)
    items = [(f"picture {number}", picture) for number, picture in enumerate(pictures, 1)]
    stats = caption(request, items, models, watch, done=answers.__setitem__, failed=stop)
    if stats is None:
        raise NoAnswerError("There is no picture to answer about.")
    return Result(tuple(answers[index] for index in sorted(answers)), stats)


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
    stats = None
    for index, (name, item) in enumerate(items):
        single = replace(request, images={name: item() if callable(item) else item}, image_mode=IMAGE_MODES[0])
        try:
            result = run(single, models, watch)
        except (media.MediaError, NoAnswerError, OSError) as error:
            failed(index, error)
        else:
            stats = result.stats
            done(index, result.answers[0])
    return stats


def _in_turn(request: Request, models: ModelCache, work: Callable[[], Any]) -> Any:
    """Do the work with the models to ourselves, and let the request's go when it says."""
    # The frame that holds the model is the work's, and it has ended when the turn gives the memory back.
    with models.turn(request.load, keep=request.release != AFTER_THE_NODE):
        result = work()
    if request.release == AFTER_THE_PROMPT:
        used_at = time.monotonic()
        host.when_prompt_ends(lambda: models.forget(request.load, unless_used_after=used_at))
    return result


def _answer(request: Request, models: ModelCache, watch: Watch) -> Result:
    start = time.perf_counter()
    prompt.require_question(request)
    pictures = media.pictures(request.images)
    video = media.read_video(request.video_path) if request.video_path else None
    watch.check()

    before_load = time.perf_counter()
    source = models.source(request.load) or find_source(request.load)
    tokens = prompt_tokens(request.system + request.text, pictures, video, PICTURE_PIXELS[1])
    need = source.request_bytes(tokens + request.sampling.max_new_tokens, tokens)
    model = models.get(source, need)
    load_s = time.perf_counter() - before_load
    watch.check()

    question = prompt.encode(model, request, pictures, video)
    watch.check()

    seed = None if request.sampling.greedy else _drawn(request.sampling.seed)
    prepared_s = time.perf_counter() - start - load_s
    made, written = _generate(model, question, request, seed, watch)
    if made is None:
        models.make_room(request.load, need)
        made, written = _generate(model, question, request, seed, watch)
    if made is None:
        raise source.out_of_memory("answer", need)

    thinking, text = prompt.split_thinking(written, question.thinks)
    if text is None:
        raise NoAnswerError(
            f"{request.load.model} was still thinking after {len(made.ids)} tokens, so there is no answer. "
            "Raise max_new_tokens, or pick a model that does not think (Instruct)."
        )
    watch.end(text)
    stats = Stats(
        **_loaded(model),
        **_generated(made, prepared_s),
        seed=seed,
        prompt_tokens=question.tokens,
        load_s=load_s,
        total_s=time.perf_counter() - start,
    )
    log.info("%s", stats)
    return Result((Answer(text, thinking),), stats)


def _generate(
    model: ModelHandle, question: prompt.Prompt, request: Request, seed: int | None, watch: Watch
) -> tuple[Generation | None, str]:
    """Tokens and text; None where memory ran out, with everything that was made for it given back."""
    stream = prompt.TextStream(model.tokenizer)

    def on_tokens(rows: Sequence[Sequence[int]]) -> None:
        stream.push(rows[0])
        watch.update(stream.tokens, stream.text)

    try:
        arguments = (question.inputs, request.sampling, seed, on_tokens, watch.check, question.media)
        return model.decoder.generate(*arguments), stream.end()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        log.warning("out of memory while answering: %s", str(error).splitlines()[0])
        traceback.clear_frames(error.__traceback__)
    model.decoder.drop_buffers()
    return None, ""


def _loaded(model: ModelHandle) -> dict[str, Any]:
    """The statistics of the load."""
    return {
        "model": model.spec.model,
        "device": model.machine.device,
        "dtype": str(model.machine.dtype).removeprefix("torch."),
        "quantization": model.plan.quantization,
        "attention": model.plan.attention,
        "fallbacks": model.plan.fallbacks,
    }


def _generated(made: Generation, prepared_s: float) -> dict[str, Any]:
    """The statistics of the generation."""
    return {
        "new_tokens": len(made.ids),
        "first_token_s": prepared_s + made.prefill_s,
        "prefill_s": made.prefill_s,
        "decode_tokens_per_s": made.tokens_per_s,
        "reused_tokens": made.reused_tokens,
        "tier": made.tier,
        "tier_reason": made.tier_reason,
    }


def _drawn(seed: int) -> int:
    return secrets.randbits(53) if seed == -1 else seed
