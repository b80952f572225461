"""The token loop: token ids in, token ids and times out. Knows no text and no ComfyUI.

Three tiers, of which the first that fits is used: our own step for dense Qwen models (lanes.py, own_step.py); on a GPU,
transformers' forward on a static cache (static_cache.py); and transformers' generate() (hf_generate.py). On a GPU the
steps of the first two are captured (cuda_graph.py).
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
# How many tokens late the host sees what a GPU makes: cancel, live text and the end of the text wait for that long.
LAG = 3
# Kinds of sampling for which captured steps are kept: each has a graph and its memory.
KEPT_SAMPLERS = 4
# Runs in a row in which a capture may fail before no more is tried. Those in which memory ran out do not count: the
# next may find enough.
CAPTURE_TRIES = 3


class Tier(NamedTuple):
    """A way of making tokens, and why it is not a faster one; "" where it is the fastest."""

    name: str
    reason: str


def best_tier(model: Any, decode: str) -> Tier:
    """The fastest tier that fits the model where it is.

    Args:
        decode: the step of our own that fits the model's family; "" where none does.
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
    """Generates with one model; holds its fused weights, buffers and captured steps, and goes when the model goes.

    Args:
        model: a transformers model.
        attention: what the model was loaded with.
        tier: "own step", "generic step" or "generate", for benchmarks and tests; None takes the best that fits.
        decode: the step of our own that fits the model's family; "" where none does.
    """

    def __init__(self, model: Any, attention: str, tier: str | None = None, *, decode: str = "") -> None:
        self._model = model
        self.tier, self.tier_reason = Tier(tier, "asked for") if tier else best_tier(model, decode)
        # What a token attends with, which need not be what the prompt did.
        self.attention = attention
        self._lanes: Lanes | None = None
        if self.tier == OwnStepLanes.name:
            self._lanes = OwnStepLanes(model, attention)
            self.attention = self._lanes.attention(False)
        elif self.tier == StaticCacheLanes.name:
            self._lanes = StaticCacheLanes(model)
        self._vocabulary = model.get_output_embeddings().weight.shape[0]
        self._samplers: dict[tuple[Any, ...], Sampler] = {}
        # LLM.int8 looks at its outliers on the host, which no capture survives.
        self._captures = model.device.type == "cuda" and not getattr(model, "is_loaded_in_8bit", False)
        self._steps: dict[tuple[Sampler, int, str], CapturedStep] = {}
        # By what the step attended with: how often in a row it could not be captured.
        self._failed: Counter[str] = Counter()
        self._tokens: dict[int, torch.Tensor] = {}
        # Around the model's own arithmetic.
        self._computed = WrappedErrors(
            f"{model.name_or_path} was loaded, but cannot be computed. Its files do not fit together, or not the "
            "installed transformers: download it again, or ask whoever made it",
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
            media: names the content of the pictures and videos, so that a prompt about the same ones is recognised.

        Raises:
            UnusableError: the model's forward pass fails.
            NotFiniteError: what it computes for a row is no numbers. Nobody has been told of that token.
            Whatever on_tokens and check raise, at the token or layer at which they do.
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
        return rows.generation(self.tier, ", and ".join(each for each in reasons if each), reused)

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
        """Give back buffers that hold no numbers: what a mask hides of them would be none for the next prompt too."""
        for each in self._tokens.values():
            each.tolist()  # the device may be some steps ahead, and still uses them
        self.drop_buffers()

    def drop_buffers(self) -> None:
        """Give back everything but the weights."""
        self._steps.clear()
        self._samplers.clear()
        self._tokens.clear()
        if self._lanes is not None:
            self._lanes.drop()

    def _sampler(self, sampling: Sampling, batch: int) -> Sampler:
        """One for each kind of sampling: captured steps go on using its tensors."""
        key = (batch, *Sampler.kind(sampling))
        # Last in the order is what was used last.
        sampler = self._samplers.pop(key, None) or Sampler(sampling, batch, self._vocabulary, self._model.device)
        self._samplers[key] = sampler
        if len(self._samplers) > KEPT_SAMPLERS:
            oldest = self._samplers.pop(next(iter(self._samplers)))
            self._steps = {key: step for key, step in self._steps.items() if key[0] is not oldest}
        return sampler

    def _loop(self, lanes: Lanes, tokens: torch.Tensor, sampling: Sampling, sample: Sampler, rows: Rows) -> None:
        """Token by token, until every row has ended."""
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
        """The same by one launch a token, with the host LAG tokens behind; what is made past an end is thrown away.

        Returns:
            The last tokens, and whether no capture failed; where one does, the eager loop goes on from there.
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
        """The step of this batch, length and kind of sampling, captured if it is new; None where that fails."""
        if self._version != lanes.version:
            self._steps.clear()  # they point into a buffer that is gone
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
        """Whether the run goes on without a graph, and not with a simpler step; after CAPTURE_TRIES, all runs do."""
        transient = _ran_out(error)
        self._failed[attention] += not transient
        whole = transient or not lanes.simplify()
        how = "runs without a CUDA graph" if whole else "is made simpler"
        if self._failed[attention] < CAPTURE_TRIES:
            log.info("the decode step of this answer %s: %s", how, error)
            return whole
        log.warning("this model's decode step %s from now on, for it failed %d times: %s", how, CAPTURE_TRIES, error)
        self._captures = not whole
        return whole


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out somewhere on the way to this error."""
    return error is not None and (is_out_of_memory(error) or _ran_out(error.__cause__ or error.__context__))


def _end_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
