"""The generic step: transformers' forward on a static cache, for models that our own step does not cover."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .kv_cache import AHEAD, LARGEST_DOUBLING, capacity_for, span_for
from .own_step import SLIDES, slides, text_stack
from .prefill import Check, Inputs, Prefill, checked, named_cache

# Kinds of layer whose state transformers' static cache keeps in tensors that never move or grow.
STATIC_LAYERS = {"full_attention", "linear_attention"}
# New tokens for which there is room at first; the cache grows where an answer is longer.
HEADROOM = 1024


def why_not_generic(model: Any) -> str | None:
    """Return the reason why the model cannot use the generic step, or None."""
    from transformers import cache_utils

    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "it is spread over several devices"
    if (attention := model.config._attn_implementation) not in ("sdpa", "eager"):
        return f"its static cache needs attention_mode sdpa, and the model has {attention}"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers does not offer a static cache for it"
    if not hasattr(cache_utils.StaticLayer(1), "cumulative_length"):
        return "this version of transformers keeps the position of its static cache on the host"
    kinds = {*(getattr(model.config.get_text_config(), "layer_types", None) or STATIC_LAYERS)}
    if others := kinds - STATIC_LAYERS:
        return f"the state of its {', '.join(sorted(others))} layers grows with every token"
    return SLIDES if slides(text_stack(model)) else None


class StaticCacheLanes:
    """The interface of OwnStepLanes with transformers' forward, cache and mask in place of ours."""

    name = "generic step"

    def __init__(self, model: Any) -> None:
        self._model = model
        self.version = 0
        self._cache: Any = None
        # Layers with their whole keys and values; the layers themselves hold views of the first slots, see _show().
        self._whole: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
        self._capacity = self._batch = self._filled = 0
        # Tokens that the first span of a masked step has room for.
        self._ahead = 0
        # SDPA takes a mask of booleans, eager attention one that is added to the scores.
        self._adds = model.config._attn_implementation == "eager"
        self._mask = self._slot = self._positions = torch.empty(0)

    @property
    def _visible(self) -> float | bool:
        """The mask's value at a slot with a token."""
        return 0.0 if self._adds else True

    @property
    def _hidden(self) -> float | bool:
        """The mask's value at a slot without a token."""
        return float("-inf") if self._adds else False

    @property
    def state(self) -> list[torch.Tensor]:
        """The tensors that a step changes: its own counters, and those of the cache besides keys and values."""
        fields = (vars(layer) for layer in self._cache.layers)
        others = [value for named in fields for name, value in named.items() if name not in ("keys", "values")]
        # Linear attention keeps its states in dictionaries, one entry per kind of state.
        flat = [part for value in others for part in (value.values() if isinstance(value, dict) else [value])]
        return [self._slot, self._positions, self._mask, *(part for part in flat if isinstance(part, torch.Tensor))]

    @contextmanager
    def checked_loop(self, check: Check) -> Iterator[None]:
        """Call check on a CPU before every layer of the steps within the block, of which none is captured."""
        with checked(self._model, check) as after_the_prompt:
            after_the_prompt()
            yield

    def prefill(self, inputs: Inputs, max_new_tokens: int, check: Check, media: str) -> Prefill:
        """Run the whole prompt into the cache. No earlier prompt is reused: recurrent states cannot be shortened."""
        from transformers import StaticCache

        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        batch, length = ids.shape
        needed = capacity_for(length + min(max_new_tokens, HEADROOM))
        if not self._whole or self._batch != batch or self._capacity < needed:
            self.drop()
            # As long as the prompt, so that the prompt attends to no empty slots.
            self._cache = StaticCache(config=self._model.config, max_cache_len=length)
            self._batch = batch
            self._slot = torch.zeros(1, dtype=torch.long, device=ids.device)
            self._positions = torch.empty(0)
        else:
            self._show(length)
        self._cache.reset()
        positions = self._model._prepare_position_ids_for_generation(ids, dict(inputs))
        given = {name: value for name, value in inputs.items() if name != "attention_mask"}
        with checked(self._model, check):
            output = self._model(
                **given,
                attention_mask=None if bool(mask.all()) else mask,
                position_ids=positions,
                **named_cache(self._model, self._cache),
                use_cache=True,
                logits_to_keep=1,
            )
        if not self._whole:
            self._lengthen(needed)
        following = positions[..., -1:] + 1
        if self._positions.shape != following.shape:
            self._positions = following.clone()
        self._positions.copy_(following)
        self._mask.fill_(self._hidden)
        self._mask[:, 0, 0, :length].masked_fill_(mask.bool(), self._visible)
        self._slot.fill_(length)
        self._filled = length
        self._ahead = length + min(max_new_tokens, AHEAD)
        return Prefill(0, output.logits[:, -1].float())

    def grow(self) -> None:
        """Grow the cache if the next token has no place in it."""
        if self._filled < self._capacity:
            return
        larger = capacity_for(self._capacity + 1)
        self._show(self._capacity)
        mask = self._mask
        self._lengthen(larger)
        self._mask[..., : mask.shape[-1]] = mask

    def _lengthen(self, capacity: int) -> None:
        """Give the layers room for `capacity` tokens; they keep the tokens that they hold."""
        # Layers of linear attention have no keys.
        layers = [layer for layer in self._cache.layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
        self._whole.clear()
        for layer in layers:
            # One layer after the other, so that the text is never in memory twice.
            layer.keys, layer.values = _lengthened(layer.keys, capacity), _lengthened(layer.values, capacity)
            layer.max_cache_len = capacity
        self._whole = [(layer, layer.keys, layer.values) for layer in layers]
        kind = self._model.dtype if self._adds else torch.bool
        shape = (self._batch, 1, 1, capacity)
        self._mask = torch.full(shape, self._hidden, dtype=kind, device=self._slot.device)
        self._capacity = capacity
        self.version += 1

    def _show(self, slots: int) -> None:
        """Give the layers views of the first `slots` slots only."""
        for layer, keys, values in self._whole:
            if layer.max_cache_len != slots:
                layer.keys, layer.values = keys[:, :, :slots], values[:, :, :slots]
                layer.max_cache_len = slots

    def step(self, tokens: torch.Tensor, span: int | None = None) -> torch.Tensor:
        """Compute (B, V) logits of (B,) tokens; transformers' cache counts the tokens itself."""
        # A step that is not captured attends to the text only.
        span = span or self._filled + 1
        self._show(span)
        self._mask.index_fill_(3, self._slot, self._visible)
        output = self._model(
            input_ids=tokens[:, None],
            attention_mask=self._mask[..., :span],
            position_ids=self._positions,
            **named_cache(self._model, self._cache),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def count_on_device(self) -> None:
        """Count a token on the device, as part of a captured step."""
        self._positions.add_(1)
        self._slot.add_(1)

    def count_on_host(self) -> None:
        """Count a token on the host."""
        self._filled += 1

    def span(self) -> int:
        """Return how many slots the next captured step attends to; seldom changed, as a new span is a new capture."""
        return min(span_for(max(self._filled + 1, self._ahead)), self._capacity)

    def attention(self, static: bool) -> str:
        """Return the name of transformers' attention, the same for every step."""
        return self._model.config._attn_implementation

    def simplify(self) -> bool:
        """Return False: this step has no simpler form."""
        return False

    def as_chosen(self) -> None:
        """Do nothing: simplify() switches nothing off."""

    def drop(self) -> None:
        """Give the cache back."""
        self._cache = None
        self._whole = []
        self.version += 1

    def finish(self, inputs: Inputs, ids: list[list[int]], media: str) -> None:
        """Forget the prompt; keep the cache's memory unless it exceeds LARGEST_DOUBLING tokens."""
        if self._capacity > LARGEST_DOUBLING:
            self.drop()


def _lengthened(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    """Copy (B, heads, slots before, dim) into a new tensor with `slots` slots, the new ones zero."""
    batch, heads, before, dim = tensor.shape
    longer = tensor.new_zeros(batch, heads, slots, dim)
    longer[:, :, :before] = tensor
    return longer
