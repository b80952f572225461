"""START HERE: one question from request to result, in five steps."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

from . import host, media, prompt
from .budget import is_out_of_memory, prompt_tokens
from .cache import ModelCache
from .diagnostics import Diagnosis
from .loader import PICTURE_PIXELS, ModelHandle
from .log import log
from .report import tell_of
from .request import RELEASES, Request, Result, Stats
from .rows import Generation
from .source import find_source

_, AFTER_THE_PROMPT, AFTER_THE_NODE = RELEASES


class NoAnswerError(RuntimeError):
    """The model used up its tokens before it began to answer."""


class Watch(Protocol):
    """Who looks on while an answer is made: ComfyUI's node, or the terminal."""

    def check(self) -> None:
        """Raise to cancel."""

    def update(self, new_tokens: int, text: str) -> None:
        """After every token: how many there are, and the whole text so far. Raise to cancel."""

    def end(self, text: str) -> None:
        """Once, with the final answer."""


def run(request: Request, models: ModelCache, watch: Watch) -> Result:
    """Answer one request.

    Raises:
        ValueError, RuntimeError: the subclasses of media, catalog, download, loader, prompt and budget, which say
            what was asked, why it cannot be and what to do; and whatever watch raises to cancel.
    """
    # The frame that holds the model is _answer's, and it has ended when the turn gives the memory back.
    with models.turn(request.load, keep=request.release != AFTER_THE_NODE):
        result = _answer(request, models, watch)
    if request.release == AFTER_THE_PROMPT:
        used_at = time.monotonic()
        host.when_prompt_ends(lambda: models.forget(request.load, unless_used_after=used_at))
    return result


def _answer(request: Request, models: ModelCache, watch: Watch) -> Result:
    start = time.perf_counter()
    diagnosis = Diagnosis(request.diagnostics)
    prompt.require_question(request)
    with diagnosis.phases("media"):
        pictures = media.pictures(request.images)
        video = media.read_video(request.video_path) if request.video_path else None
    watch.check()

    before_load = time.perf_counter()
    source = models.source(request.load) or find_source(request.load)
    tokens = prompt_tokens(request.system + request.text, pictures, video, PICTURE_PIXELS[1])
    need = source.request_bytes(tokens + request.sampling.max_new_tokens, tokens)
    model = models.get(source, need)
    load_s = time.perf_counter() - before_load
    tell_of(type(model.model.config).model_type)
    watch.check()

    question = prompt.encode(model, request, pictures, video, diagnosis.phases)
    watch.check()

    seed = None if request.sampling.greedy else _drawn(request.sampling.seed)
    prepared_s = time.perf_counter() - start - load_s
    with diagnosis.watching(model.model):
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
    return Result(text, thinking, diagnosis.finish(stats, [made], request.load))


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
