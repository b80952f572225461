"""Own-step lanes: the key-value buffer of one model, its prefill and its steps; one lane per row of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .kv_cache import AHEAD, LARGEST_DOUBLING, KVCache, capacity_for, span_for
from .own_step import OwnStep
from .prefill import Check, Inputs, Prefill, checked, extend, forward

# Tokens for which there is room at first: an answer of the default length. The buffer grows where one is longer, and
# what was captured is captured anew in its middle; memory for the longest was asked for before the run in any case.
HEADROOM = 512
# Larger buffers than this are given back after the run.
KEPT_CAPACITY = LARGEST_DOUBLING
# Not worth a second forward: fewer tokens than this in common with the last prompt.
LEAST_REUSE = 16


@dataclass(slots=True)
class _Remembered:
    """What the buffer holds since the last run: for a next prompt that begins alike."""

    ids: list[int]
    media: str


class OwnStepLanes:
    """Prefill, then step by step; the state that a captured step works on.

    Args:
        model: a transformers model that OwnStep takes.
        attention: what it was loaded with.

    Attributes:
        state: tensors that a step changes and a warm-up must give back as they were.
        version: changes when the buffer was made anew, which makes captured steps worthless.
    """

    name = "own step"

    def __init__(self, model: Any, attention: str) -> None:
        self._model = model
        self._step = OwnStep(model, attention)
        self._kv: KVCache | None = None
        self._remembered: _Remembered | None = None
        # How long a masked step takes the text to become.
        self._ahead = 0
        self._check: Check | None = None
        self.version = 0

    @property
    def kv(self) -> KVCache:
        """The buffer; there is one from the first prefill on."""
        if self._kv is None:
            raise RuntimeError("there is no key-value buffer before the prefill")
        return self._kv

    @property
    def state(self) -> list[torch.Tensor]:
        return [self.kv.lens]

    @contextmanager
    def checked_loop(self, check: Check) -> Iterator[None]:
        """Within the block no step is captured, and check is called before every layer of one."""
        self._check = check
        try:
            yield
        finally:
            self._check = None

    def prefill(self, inputs: Inputs, max_new_tokens: int, check: Check, media: str) -> Prefill:
        """Bring the prompt into the buffer."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        reused = self._in_common(inputs, media)
        # What is remembered is true again only when this run has ended well.
        self._remembered = None
        kv = self._buffer_for(len(ids), ids.shape[1] + min(max_new_tokens, HEADROOM), reused)
        with checked(self._model, check):
            made = extend(self._model, ids, kv, reused) if reused else forward(self._model, inputs)
        kv.fill(made.cache, mask, made.offset, reused)
        self._ahead = kv.filled + min(max_new_tokens, AHEAD)
        self._reach()
        return Prefill(reused, made.logits)

    def _reach(self) -> None:
        """Rotary tables for the whole buffer. Videos of tiny frames have positions beyond their number of tokens."""
        if self._step.reach(self.kv.capacity + max(0, int(self.kv.offset.max()))):
            self.version += 1  # captured steps read the old tables

    def grow(self) -> None:
        """Grow the buffer if the next token has no place in it."""
        if self.kv.filled == self.kv.capacity:
            self._buffer_for(self.kv.batch, self.kv.capacity + 1, reused=self.kv.filled)
            self._reach()

    def step(self, tokens: torch.Tensor, span: int | None = None) -> torch.Tensor:
        """(B,) tokens -> (B, V) logits; the tokens are stored, but not counted."""
        return self._step(tokens, self.kv, span, self._check)

    def count_on_device(self) -> None:
        """Part of a captured step."""
        self.kv.lens.add_(1)

    def count_on_host(self) -> None:
        """The host's share of counting a token."""
        self.kv.filled += 1

    def span(self) -> int:
        """How many slots the next captured step attends to: one number for as much of an answer as can be."""
        if self._step.attention.reads_only_text(self.kv.capacity):
            return self.kv.capacity  # slots without a token cost nothing
        return min(span_for(max(self.kv.filled + 1, self._ahead)), self.kv.capacity)

    def attention(self, static: bool) -> str:
        """What a step attends with now; static where it is one over a span."""
        return self._step.attention.at(self.span() if static and self._kv is not None else None).name

    def simplify(self) -> bool:
        """Give up the boldest part of the step after a failure; whether there was one."""
        return self._step.attention.all_as_short()

    def as_chosen(self) -> None:
        """Take back what was given up."""
        self._step.attention.as_chosen()

    def drop(self) -> None:
        """Give the buffer back."""
        self._kv = self._remembered = None
        self.version += 1

    def finish(self, inputs: Inputs, ids: list[list[int]], media: str) -> None:
        """Remember what the buffer holds, or give a large one back."""
        if self.kv.capacity > KEPT_CAPACITY:
            self.drop()
        elif self.kv.batch == 1:
            prompt = inputs["input_ids"][0].tolist()
            self._remembered = _Remembered([*prompt, *ids[0]][: self.kv.filled], media)

    def _buffer_for(self, batch: int, tokens: int, reused: int) -> KVCache:
        """The buffer, made or grown as needed; the first `reused` slots keep what they hold."""
        kv = self._kv
        if kv is not None and kv.batch == batch and kv.capacity >= tokens:
            return kv
        self.version += 1
        self._kv = None  # the old one goes as the new one comes
        if kv is not None and reused:
            kv.filled = reused
            self._kv = kv.grown(capacity_for(tokens))
        else:
            del kv
            self._kv = self._step.allocate(batch, capacity_for(tokens))
        return self._kv

    def _in_common(self, inputs: Inputs, media: str) -> int:
        """How many tokens from the start the buffer holds already, pictures and videos included."""
        last, ids = self._remembered, inputs["input_ids"]
        if last is None or len(ids) > 1 or last.media != media:
            return 0
        new = ids[0].tolist()
        pairs = zip(last.ids, new[:-1], strict=False)  # the last token is always computed: its logits are needed
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(last.ids), len(new) - 1))
        config = self._model.config
        pads = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
        return common if common >= LEAST_REUSE and pads.isdisjoint(new[common:]) else 0
