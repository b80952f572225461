"""Prefill and token loop: token ids in, token ids and times out. Knows no text and no ComfyUI.

Three tiers, the first that fits is used: our own step for dense Qwen models (dense.py); transformers' forward on
a static cache, where a GPU can capture it (generic.py); and transformers' generate().
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .dense import DenseStep, text_stack, why_not_dense
from .keyvalues import KeyValues, capacity_for
from .request import Sampling
from .sampling import Chooser

# Called with the new tokens of each row as soon as they are known; raising in it stops the loop.
OnTokens = Callable[[Sequence[Sequence[int]]], None]
# Called often while there is no token yet; raising in it stops the prefill.
Check = Callable[[], None]

# Larger key-value buffers than this are given back after the run.
KEPT_CAPACITY = 8192
# Tokens for which there is room at first; the buffer grows where an answer is longer.
HEADROOM = 256
# Not worth a second forward: fewer tokens than this in common with the last prompt.
LEAST_REUSE = 16


@dataclass(frozen=True, slots=True)
class Generation:
    """The new token ids of each row, the one that ended it left out, and how they were made."""

    rows: tuple[tuple[int, ...], ...]
    prefill_s: float
    decode_s: float
    steps: int
    tier: str
    tier_reason: str
    reused_tokens: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of a single row."""
        (row,) = self.rows
        return row

    @property
    def tokens_per_s(self) -> float:
        """Tokens of one row per second of the loop alone: the first token belongs to the prefill."""
        return self.steps / self.decode_s if self.steps and self.decode_s > 0 else 0.0


@dataclass(slots=True)
class _Remembered:
    """What the key-value buffer holds since the last run: for a next prompt that begins alike."""

    ids: list[int]
    media: str


class Decoder:
    """Generates with one model; holds its fused weights and buffers, and goes when the model goes.

    Args:
        model: a transformers model.
        attention: what the model was loaded with.
        tier: "own step" or "generate", for benchmarks and tests; None takes the best that fits.
    """

    def __init__(self, model: Any, attention: str, tier: str | None = None) -> None:
        self._model = model
        self.tier_reason = "asked for" if tier else why_not_dense(model) or "it fits"
        self.tier = tier or ("own step" if self.tier_reason == "it fits" else "generate")
        self._step = DenseStep(model, attention) if self.tier == "own step" else None
        self._kv: KeyValues | None = None
        self._remembered: _Remembered | None = None

    def generate(
        self,
        inputs: dict[str, Any],
        sampling: Sampling,
        seed: int | None,
        on_tokens: OnTokens,
        check: Check,
        media: str = "",
    ) -> Generation:
        """Continue each row until the model ends it or max_new_tokens is reached.

        Args:
            inputs: keywords of the model's generate(); input_ids (B, L), padded on the left.
            seed: seeds the run's own generator; None where sampling is greedy.
            on_tokens: called in this thread after every token with one list per row, empty where the row has ended.
            check: called in this thread before every layer of the prefill, the vision tower's too.
            media: names the content of the pictures and videos, so that a prompt about the same ones is recognised.

        Raises:
            Whatever on_tokens and check raise, at the token or layer at which they do.
        """
        ids = inputs["input_ids"]
        rows = _Rows(len(ids), _end_ids(self._model), on_tokens)
        choose = Chooser(sampling, seed, ids.device)
        reused = 0
        with torch.inference_mode():
            choose.start(ids, inputs["attention_mask"], self._model.get_output_embeddings().weight.shape[0])
            if self._step is None:
                _generate_all(self._model, inputs, sampling.max_new_tokens, choose, rows, check)
            else:
                reused, logits = self._prefill(inputs, sampling.max_new_tokens, check, media)
                self._loop(choose(logits), sampling.max_new_tokens, choose, rows)
                self._remember(inputs, rows, media)
        return rows.generation(self.tier, self.tier_reason, reused)

    def _prefill(
        self, inputs: dict[str, Any], max_new_tokens: int, check: Check, media: str
    ) -> tuple[int, torch.Tensor]:
        """Bring the prompt into the key-value buffer; returns how much was there already, and the last logits."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        reused = self._in_common(inputs, media)
        # What is remembered is true again only when this run has ended well.
        self._remembered = None
        kv = self._room(len(ids), ids.shape[1] + min(max_new_tokens, HEADROOM), reused)
        with _checked(self._model, check):
            if reused:
                cache, logits = _extend(self._model, ids, kv, reused)
                offset = kv.offset.clone()
            else:
                cache, logits, offset = _forward(self._model, inputs)
        kv.fill(cache, mask, offset, reused)
        return reused, logits

    def _room(self, batch: int, tokens: int, reused: int) -> KeyValues:
        """The buffer, made or grown as needed; the first `reused` slots keep what they hold."""
        assert self._step is not None
        kv = self._kv
        if kv is None or kv.batch != batch or (kv.capacity < tokens and not reused):
            self._kv = kv = None  # the old one goes before the new one comes
            self._kv = kv = self._step.allocate(batch, capacity_for(tokens))
        elif kv.capacity < tokens:
            kv.filled = reused
            self._kv = kv = kv.grown(capacity_for(tokens))
        self._step.reach(kv.capacity)
        return kv

    def _loop(self, tokens: torch.Tensor, max_new_tokens: int, choose: Chooser, rows: _Rows) -> None:
        assert self._step is not None
        while not rows.push(tokens.tolist()) and rows.steps < max_new_tokens:
            kv = self._kv
            assert kv is not None
            if kv.filled == kv.capacity:
                kv = self._room(kv.batch, kv.capacity + 1, reused=kv.filled)
            logits = self._step(tokens, kv)
            kv.advance()
            tokens = choose(logits)

    def _in_common(self, inputs: dict[str, Any], media: str) -> int:
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

    def _remember(self, inputs: dict[str, Any], rows: _Rows, media: str) -> None:
        kv = self._kv
        assert kv is not None
        if kv.capacity > KEPT_CAPACITY:
            self._kv = None
        elif kv.batch == 1:
            prompt = inputs["input_ids"][0].tolist()
            self._remembered = _Remembered([*prompt, *rows.all_ids[0]][: kv.filled], media)


class _Rows:
    """Collects the tokens of each row, tells of them, and takes the times."""

    def __init__(self, batch: int, end_ids: frozenset[int], on_tokens: OnTokens) -> None:
        # With the token that ended a row, as the model was given it.
        self.all_ids: list[list[int]] = [[] for _ in range(batch)]
        self.steps = 0
        self._ended = [False] * batch
        self._end_ids = end_ids
        self._on_tokens = on_tokens
        self._start = self._first = self._last = time.perf_counter()

    def push(self, tokens: list[int]) -> bool:
        """Take the next token of each row; returns whether all rows have ended."""
        self._last = time.perf_counter()
        if not self.steps:
            self._first = self._last
        self.steps += 1
        new: list[list[int]] = [[] for _ in tokens]
        for row, token in enumerate(tokens):
            if self._ended[row]:
                continue
            self.all_ids[row].append(token)
            self._ended[row] = token in self._end_ids
            if not self._ended[row]:
                new[row].append(token)
        self._on_tokens(new)
        return all(self._ended)

    def generation(self, tier: str, reason: str, reused: int) -> Generation:
        ids = tuple(tuple(row[:-1] if ended else row) for row, ended in zip(self.all_ids, self._ended, strict=True))
        prefill, loop = self._first - self._start, self._last - self._first
        return Generation(ids, prefill, loop, self.steps - 1, tier, reason, reused)


def _forward(model: Any, inputs: dict[str, Any]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """transformers' own prefill: its cache, the last logits (B, V) float32, and each row's rotary offset (B,).

    generate() for one token prepares positions and masks as each family and version wants them; the positions are
    read where they are used, since versions count them differently.
    """
    from transformers import LogitsProcessorList

    keep = _KeepLogits()
    positions: list[torch.Tensor] = []
    hook = text_stack(model).rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1]),
        with_kwargs=True,
    )
    try:
        made = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=1,
            use_cache=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([keep]),
        )
    finally:
        hook.remove()
    lengths = inputs["attention_mask"].sum(1)
    # The last token is text, which has one position on every axis.
    last = positions[0].reshape(-1, *positions[0].shape[-2:])[0, :, -1]
    return made.past_key_values, keep.logits, last + 1 - lengths


def _extend(model: Any, ids: torch.Tensor, kv: KeyValues, known: int) -> tuple[Any, torch.Tensor]:
    """The prefill of a prompt of which the first `known` tokens are in the buffer. Text only from there on."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        cache.update(keys[:, :, :known], values[:, :, :known], layer)
    positions = torch.arange(known, ids.shape[1], device=ids.device)[None] + kv.offset[:, None]
    if hasattr(model.config, "vision_config"):
        # Text has one position on all three axes: time, height and width.
        positions = positions.expand(3, *positions.shape)
    made = model(
        input_ids=ids[:, known:],
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return made.past_key_values, made.logits[:, -1].float()


class _KeepLogits:
    """A logits processor that only looks."""

    logits: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores
        return scores


def _generate_all(
    model: Any, inputs: dict[str, Any], max_new_tokens: int, choose: Chooser, rows: _Rows, check: Check
) -> None:
    """The last tier: transformers' generate() with our sampling in its loop."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    with _checked(model, check) as unhook:
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([_OnlyChosen(choose)]),
            stopping_criteria=StoppingCriteriaList([_Report(rows, unhook)]),
        )


class _OnlyChosen:
    """Our sampling as a logits processor: everything but the chosen token is masked, and arg-max takes what is left.

    generate()'s own sampling draws from torch's global generator, which other nodes seed and use.
    """

    def __init__(self, choose: Chooser) -> None:
        self._choose = choose

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, float("-inf")).scatter(1, self._choose(scores)[:, None], 0.0)


class _Report:
    """A stopping criterion that never stops: generate() calls it once a token."""

    def __init__(self, rows: _Rows, at_first: Callable[[], None]) -> None:
        self._rows = rows
        self._at_first = at_first

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self._rows.steps:
            self._at_first()
        self._rows.push(input_ids[:, -1].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _checked(model: torch.nn.Module, check: Check) -> Iterator[Callable[[], None]]:
    """Within the block, check is called before every transformer layer; the value given ends that earlier."""
    lists = [m for name, m in model.named_modules() if name.endswith((".layers", ".blocks"))]
    layers = [layer for each in lists if isinstance(each, torch.nn.ModuleList) for layer in each]
    hooks = [layer.register_forward_pre_hook(lambda *_: check()) for layer in layers]

    def unhook() -> None:
        while hooks:
            hooks.pop().remove()

    try:
        yield unhook
    finally:
        unhook()


def _end_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [ids])
