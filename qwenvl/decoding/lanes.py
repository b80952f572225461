"""Lanes of our own step: the key-value buffer of one model, its prefill and its steps; one lane per row of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .kv_cache import AHEAD, LARGEST_DOUBLING, KVCache, capacity_for, span_for
from .own_step import OwnStep
from .prefill import Check, Inputs, Prefill, checked, extend, forward

# New tokens for which there is room at first: an answer of the default length. For a longer one the buffer grows, and
# its steps are captured again; memory for the longest answer was requested before the run in any case.
HEADROOM = 512
# Larger buffers than this are given back after the run.
KEPT_CAPACITY = LARGEST_DOUBLING
# Fewer tokens in common with the last prompt than this are computed again.
LEAST_REUSE = 16


@dataclass(slots=True)
class _Remembered:
    """Token ids and media of the last run, still in the buffer for a prompt that begins with the same tokens."""

    ids: list[int]
    media: str


class OwnStepLanes:
    """The prefill and the single steps of our own step, and the state that a captured step works on.

    Args:
        model: a transformers model that OwnStep takes.
        attention: the attention with which it was loaded.

    Attributes:
        state: tensors that a step changes and that are restored after a warm-up.
        version: changes with every new buffer, after which captured steps cannot be used.
    """

    name = "own step"

    def __init__(self, model: Any, attention: str) -> None:
        self._model = model
        self._step = OwnStep(model, attention)
        self._kv: KVCache | None = None
        self._remembered: _Remembered | None = None
        # Tokens that the first span of a masked step has room for.
        self._ahead = 0
        self._check: Check | None = None
        self.version = 0

    @property
    def kv(self) -> KVCache:
        """The buffer; RuntimeError before the first prefill."""
        if self._kv is None:
            raise RuntimeError("there is no key-value buffer before the prefill")
        return self._kv

    @property
    def state(self) -> list[torch.Tensor]:
        return [self.kv.lens]

    @contextmanager
    def checked_loop(self, check: Check) -> Iterator[None]:
        """Call check before every layer of the steps within the block, of which none is captured."""
        self._check = check
        try:
            yield
        finally:
            self._check = None

    def prefill(self, inputs: Inputs, max_new_tokens: int, check: Check, media: str) -> Prefill:
        """Store the prompt's keys and values in the buffer."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        reused = self._in_common(inputs, media)
        # A run that fails leaves a buffer whose content is unknown.
        self._remembered = None
        kv = self._buffer_for(len(ids), ids.shape[1] + min(max_new_tokens, HEADROOM), reused)
        with checked(self._model, check):
            result = extend(self._model, ids, kv, reused) if reused else forward(self._model, inputs)
        kv.fill(result.cache, mask, result.offset, reused)
        self._ahead = kv.filled + min(max_new_tokens, AHEAD)
        self._reach()
        return Prefill(reused, result.logits)

    def _reach(self) -> None:
        """Extend the rotary tables to the whole buffer; videos of tiny frames have more positions than tokens."""
        if self._step.reach(self.kv.capacity + max(0, int(self.kv.offset.max()))):
            self.version += 1  # the steps captured before read the old tables

    def grow(self) -> None:
        """Grow the buffer if the next token has no place in it."""
        if self.kv.filled == self.kv.capacity:
            self._buffer_for(self.kv.batch, self.kv.capacity + 1, reused=self.kv.filled)
            self._reach()

    def step(self, tokens: torch.Tensor, span: int | None = None) -> torch.Tensor:
        """(B,) tokens -> (B, V) logits; the tokens are stored, but not counted."""
        return self._step(tokens, self.kv, span, self._check)

    def count_on_device(self) -> None:
        """Count a token on the device, as part of a captured step."""
        self.kv.lens.add_(1)

    def count_on_host(self) -> None:
        """Count a token on the host."""
        self.kv.filled += 1

    def span(self) -> int:
        """Return how many slots the next captured step attends to; seldom changed, as a new span is a new capture."""
        if self._step.attention.reads_only_text(self.kv.capacity):
            return self.kv.capacity  # slots without a token cost nothing
        return min(span_for(max(self.kv.filled + 1, self._ahead)), self.kv.capacity)

    def attention(self, static: bool) -> str:
        """Return the name of the attention that a step uses now; static is True for a step over a span."""
        return self._step.attention.at(self.span() if static and self._kv is not None else None).name

    def simplify(self) -> bool:
        """Switch off flash decoding after a failed capture; False if it was not in use."""
        return self._step.attention.all_as_short()

    def as_chosen(self) -> None:
        """Switch on again what simplify() switched off."""
        self._step.attention.as_chosen()

    def drop(self) -> None:
        """Give the buffer back."""
        self._kv = self._remembered = None
        self.version += 1

    def finish(self, inputs: Inputs, ids: list[list[int]], media: str) -> None:
        """Remember which tokens the buffer holds, or give it back if it is larger than KEPT_CAPACITY."""
        if self.kv.capacity > KEPT_CAPACITY:
            self.drop()
        elif self.kv.batch == 1:
            prompt = inputs["input_ids"][0].tolist()
            self._remembered = _Remembered([*prompt, *ids[0]][: self.kv.filled], media)

    def _buffer_for(self, batch: int, tokens: int, reused: int) -> KVCache:
        """Return a buffer for that many tokens, new or grown if needed; the first `reused` slots keep their content."""
        kv = self._kv
        if kv is not None and kv.batch == batch and kv.capacity >= tokens:
            return kv
        self.version += 1
        self._kv = None  # so that the old buffer is freed before the new one is allocated
        if kv is not None and reused:
            kv.filled = reused
            self._kv = kv.grown(capacity_for(tokens))
        else:
            del kv
            self._kv = self._step.allocate(batch, capacity_for(tokens))
        return self._kv

    def _in_common(self, inputs: Inputs, media: str) -> int:
        """Return how many of the prompt's first tokens, pictures and videos included, the buffer holds already."""
        last, ids = self._remembered, inputs["input_ids"]
        if last is None or len(ids) > 1 or last.media != media:
            return 0
        new = ids[0].tolist()
        pairs = zip(last.ids, new[:-1], strict=False)  # the last token is always computed: its logits are needed
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(last.ids), len(new) - 1))
        config = self._model.config
        pads = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
        return common if common >= LEAST_REUSE and pads.isdisjoint(new[common:]) else 0
