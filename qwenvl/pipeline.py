"""START HERE: one question from request to result, in five steps."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from . import catalog, decode, download, host, loader, media, prompt
from .cache import ModelCache
from .capabilities import machine
from .log import log
from .request import LoadSpec, Request, Result, Stats
from .rows import Generation


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
        ValueError, RuntimeError: the subclasses of media, catalog, download, loader and prompt, which say
            what was asked, why it cannot be and what to do; and whatever watch raises to cancel.
    """
    # The frame that holds the model is _answer's, and it has ended when the turn gives the memory back.
    with models.turn(keep=request.keep_loaded):
        return _answer(request, models, watch)


def _answer(request: Request, models: ModelCache, watch: Watch) -> Result:
    start = time.perf_counter()
    prompt.require_question(request)
    pictures = media.pictures(request.images)
    video = media.read_video(request.video_path) if request.video_path else None
    watch.check()

    before_load = time.perf_counter()
    model = models.get(request.load, _load)
    load_s = time.perf_counter() - before_load
    watch.check()

    question = prompt.encode(model, request, pictures, video)
    watch.check()

    stream = prompt.TextStream(model.tokenizer)
    seed = None if request.sampling.greedy else _drawn(request.sampling.seed)
    prepared_s = time.perf_counter() - start - load_s

    def on_tokens(rows: Sequence[Sequence[int]]) -> None:
        stream.push(rows[0])
        watch.update(stream.tokens, stream.text)

    made = model.decoder.generate(question.inputs, request.sampling, seed, on_tokens, watch.check, question.media)

    thinking, text = prompt.split_thinking(stream.end(), question.thinks)
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
    return Result(text, thinking, stats)


def _loaded(model: loader.ModelHandle) -> dict[str, Any]:
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


def _load(spec: LoadSpec) -> loader.ModelHandle:
    """Find the model's folder, download it if there is none, make room, and read it."""
    model, roots = catalog.find(spec.model), host.model_roots()
    folder = catalog.locate(model, roots)
    if folder is None:
        folder = catalog.candidates(model, roots)[0]
        if not model.repo_id:
            raise loader.LoadError(f"{spec.model} is damaged: {download.why_incomplete(folder)} in {folder}.")
        download.fetch(model.repo_id, folder)
    host.make_room(download.weight_bytes(folder))
    handle = loader.load(spec, folder, machine(host.device()))
    decoder = decode.Decoder(handle.model, handle.plan.attention)
    if decoder.tier_reason:
        log.info("%s makes its tokens by the %s: %s", spec.model, decoder.tier, decoder.tier_reason)
    handle.decoder = decoder
    return handle


def _drawn(seed: int) -> int:
    return secrets.randbits(53) if seed == -1 else seed
