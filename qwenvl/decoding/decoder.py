"""The token loop: token ids in, token ids and times out. It knows nothing of text or ComfyUI.

There are three tiers, and the first that fits is used: our own step for dense Qwen models (lanes.py, own_step.py); on a
GPU, transformers' forward on a static cache (static_cache.py); and transformers' generate() (hf_generate.py). On a GPU
the steps of the first two are captured (cuda_graph.py).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch

from ..errors import UnusableError, WrappedErrors
from ..faults import is_out_of_memory
from ..log import log
from ..request import Sampling
from . import hf_generate
from .cuda_graph import CapturedStep, CaptureError, ReadLater
from .lanes import OwnStepLanes
from .own_step import why_not_dense
from .prefill import Check, Inputs
from .rows import Generation, OnTokens, Rows
from .sampling import Sampler
from .static_cache import StaticCacheLanes, why_not_generic
from .step_attention import without_cudnn

Lanes = OwnStepLanes | StaticCacheLanes
PLAIN = "generate"
# How many tokens later the host sees a GPU's tokens: cancelling, live text and the end of the text are as late.
LAG = 3
# Kinds of sampling for which captured steps are kept: every kind has graphs of its own, which take memory.
KEPT_SAMPLERS = 4
# Failed captures in a row after which no more is tried. Running out of memory does not count: the next run may find
# enough.
CAPTURE_TRIES = 3


class Tier(NamedTuple):
    """A way of generating tokens, and why it is not a faster one; "" where it is the fastest."""

    name: str
    reason: str


def best_tier(model: Any, decode: str) -> Tier:
    """Return the fastest tier that fits the model on its device.

    Args:
        decode: the name of our own step for the model's family; "" if no step of ours fits it.
    """
    not_dense = why_not_dense(model, decode)
    if not_dense is None:
        return Tier(OwnStepLanes.name, "")
    if model.device.type != "cuda":
        return Tier(PLAIN, f"{not_dense}, and without CUDA graphs the generic step gains little")
    if not_generic := why_not_generic(model):
        return Tier(PLAIN, f"{not_dense}, and {not_generic}")
    return Tier(StaticCacheLanes.name, not_dense)


class Decoder:
    """The token loop of one model, with its fused weights, buffers and captured steps; it lives as long as the model.

    Args:
        model: a transformers model.
        attention: the attention with which the model was loaded.
        tier: "own step", "generic step" or "generate", for benchmarks and tests; None takes the best that fits.
        decode: the name of our own step for the model's family; "" if no step of ours fits it.
    """

    def __init__(self, model: Any, attention: str, tier: str | None = None, *, decode: str = "") -> None:
        self._model = model
        self.tier, self.tier_reason = Tier(tier, "asked for") if tier else best_tier(model, decode)
        # The attention of the decode steps; the prompt may have used another.
        self.attention = attention
        self._lanes: Lanes | None = None
        if self.tier == OwnStepLanes.name:
            self._lanes = OwnStepLanes(model, attention)
            self.attention = self._lanes.attention(False)
        elif self.tier == StaticCacheLanes.name:
            self._lanes = StaticCacheLanes(model)
        self._vocabulary = model.get_output_embeddings().out_features
        self._samplers: dict[tuple[Any, ...], Sampler] = {}
        # LLM.int8 reads its outliers on the host, which makes a capture fail.
        self._captures = model.device.type == "cuda" and not getattr(model, "is_loaded_in_8bit", False)
        self._steps: dict[tuple[Sampler, int, str], CapturedStep] = {}
        # Failed captures in a row, by the attention of the step.
        self._failed: Counter[str] = Counter()
        self._tokens: dict[int, torch.Tensor] = {}
        # Wraps errors of the model's own forward, and of nothing else.
        self._computed = WrappedErrors(
            f"{model.name_or_path} was loaded, but cannot be computed. Its files do not fit together, or do not fit "
            "the installed transformers: download it again, or ask the model's maker",
            UnusableError,
        )
        self._version = -1

    def generate(
        self,
        inputs: Inputs,
        sampling: Sampling,
        seed: int | None,
        on_tokens: OnTokens,
        check: Check,
        media: str = "",
    ) -> Generation:
        """Continue each row until the model or on_tokens ends it or max_new_tokens is reached.

        Args:
            inputs: keywords of the model's generate(); input_ids (B, L), padded on the left.
            seed: seeds the run's own generator; None where sampling is greedy.
            on_tokens: called in this thread after every token with one list per row, empty where the row has ended;
                it may return rows that are to end.
            check: called in this thread before every layer of the prefill, the vision tower's too; on a CPU before
                every part of a layer, and before every layer of a step.
            media: identifies the content of the pictures and videos, so that a prompt with the same ones is recognised.

        Raises:
            UnusableError: the model's forward pass fails.
            NotFiniteError: the logits of a row hold NaN or infinity; on_tokens was not called with that step.
            Anything that on_tokens and check raise passes through, at that token or layer.
        """
        ids = inputs["input_ids"]
        end_ids = _end_ids(self._model)
        rows = Rows(len(ids), end_ids, on_tokens)
        reused = 0
        try:
            with torch.inference_mode(), without_cudnn():
                sample = self._sampler(sampling, len(ids))
                sample.start(sampling, seed, ids, inputs["attention_mask"], end_ids)
                if self._lanes is None:
                    with self._computed:
                        hf_generate.generate(self._model, inputs, sampling.max_new_tokens, sample, rows, check)
                else:
                    reused = self._by_lanes(self._lanes, inputs, sampling, sample, rows, check, media)
        finally:
            if rows.unsound:
                self._drop_unsound()
        reasons = (self.tier_reason, self._captures and Sampler.why_not_captured(sampling))
        return rows.generation(self.tier, ", and ".join(reason for reason in reasons if reason), reused)

    def _by_lanes(
        self,
        lanes: Lanes,
        inputs: Inputs,
        sampling: Sampling,
        sample: Sampler,
        rows: Rows,
        check: Check,
        media: str,
    ) -> int:
        """Fill the rows step by step; returns how many tokens of the prompt were in the buffer already."""
        with self._computed:
            reused, logits = lanes.prefill(inputs, sampling.max_new_tokens, check, media)
        tokens = sample(logits)
        rows.push(tokens.tolist())
        captured = self._captures and not Sampler.why_not_captured(sampling)
        if captured:
            tokens, captured = self._captured_loop(lanes, tokens, sampling, sample, rows)
        with lanes.checked_loop(check):
            self._loop(lanes, tokens, sampling, sample, rows)
        self.attention = lanes.attention(captured)
        lanes.finish(inputs, rows.all_ids, media)
        return reused

    def _drop_unsound(self) -> None:
        """Give back buffers that hold NaN or infinity: a mask does not hide them, so the next prompt would fail too."""
        for tokens in self._tokens.values():
            tokens.tolist()  # waits for the device, which may be some steps ahead and still uses the buffers
        self.drop_buffers()

    def drop_buffers(self) -> None:
        """Give back everything but the weights."""
        self._steps.clear()
        self._samplers.clear()
        self._tokens.clear()
        if self._lanes is not None:
            self._lanes.drop()

    def _sampler(self, sampling: Sampling, batch: int) -> Sampler:
        """Return the sampler of this kind of sampling, kept between runs: captured steps go on using its tensors."""
        key = (batch, *Sampler.kind(sampling))
        # Taken out and put in again, so that the first key is the one unused for longest.
        sampler = self._samplers.pop(key, None) or Sampler(sampling, batch, self._vocabulary, self._model.device)
        self._samplers[key] = sampler
        if len(self._samplers) > KEPT_SAMPLERS:
            oldest = self._samplers.pop(next(iter(self._samplers)))
            self._steps = {key: step for key, step in self._steps.items() if key[0] is not oldest}
        return sampler

    def _loop(self, lanes: Lanes, tokens: torch.Tensor, sampling: Sampling, sample: Sampler, rows: Rows) -> None:
        """Generate token by token until every row has ended or max_new_tokens is reached."""
        while not rows.all_ended and rows.steps < sampling.max_new_tokens:
            lanes.grow()
            with self._computed:
                logits = lanes.step(tokens.clamp_min(0))
            lanes.count_on_device()
            lanes.count_on_host()
            tokens = sample(logits)
            rows.push(tokens.tolist())

    def _captured_loop(
        self, lanes: Lanes, tokens: torch.Tensor, sampling: Sampling, sample: Sampler, rows: Rows
    ) -> tuple[torch.Tensor, bool]:
        """Generate with one launch for each token, the host LAG tokens behind; tokens past an end are discarded.

        Returns:
            The last tokens (B,), and False if a capture failed: the eager loop then goes on from these tokens.
        """
        batch = len(tokens)
        static = self._tokens.setdefault(batch, torch.empty_like(tokens)).copy_(tokens)
        later: ReadLater | None = None
        whole = True
        if max(self._failed.values(), default=0) < CAPTURE_TRIES:
            lanes.as_chosen()
        for _ in range(rows.steps, sampling.max_new_tokens):
            if rows.all_ended:
                return static, whole
            lanes.grow()
            step = self._captured_step(lanes, static, sample)
            if step is None:
                whole = False
                break
            later = later or ReadLater(batch, LAG)
            step()
            lanes.count_on_host()
            later.send(static)
            if later.waiting > LAG:
                rows.push(later.take())
        while later and later.waiting and not rows.all_ended:
            rows.push(later.take())
        return static, whole

    def _captured_step(self, lanes: Lanes, tokens: torch.Tensor, sample: Sampler) -> CapturedStep | None:
        """Return the step for this batch, length and kind of sampling, captured if it is new; None if that fails."""
        if self._version != lanes.version:
            self._steps.clear()  # they use a buffer that was given back
            self._version = lanes.version
        while True:
            span, attention = lanes.span(), lanes.attention(True)
            key = (sample, span, attention)
            if key in self._steps:
                return self._steps[key]
            try:
                self._steps[key] = self._capture(lanes, span, tokens, sample)
            except CaptureError as error:
                if self._give_up(lanes, attention, error):
                    return None
            else:
                self._failed[attention] = 0

    def _capture(self, lanes: Lanes, span: int, tokens: torch.Tensor, sample: Sampler) -> CapturedStep:
        state = [*lanes.state, *sample.state]
        return CapturedStep(
            lambda given: lanes.step(given.clamp_min(0), span),
            sample,
            lanes.count_on_device,
            tokens,
            state,
            sample.random,
        )

    def _give_up(self, lanes: Lanes, attention: str, error: CaptureError) -> bool:
        """Log a failed capture; True if this run goes on without a graph, False if a simpler step can be captured.

        After CAPTURE_TRIES failures in a row that holds for all later runs.
        """
        transient = _ran_out(error)
        self._failed[attention] += not transient
        whole = transient or not lanes.simplify()
        how = "runs without a CUDA graph" if whole else "is made simpler"
        if self._failed[attention] < CAPTURE_TRIES:
            log.info("the decode step of this answer %s: %s", how, error)
            return whole
        log.warning("this model's decode step %s from now on: it failed %d times: %s", how, CAPTURE_TRIES, error)
        self._captures = not whole
        return whole


def _ran_out(error: BaseException | None) -> bool:
    """Return True if this error, or one that led to it, is that memory ran out."""
    return error is not None and (is_out_of_memory(error) or _ran_out(error.__cause__ or error.__context__))


def _end_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
