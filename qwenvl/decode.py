"""Prefill and token loop: token ids in, token ids and times out. Knows no text and no ComfyUI."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .request import Sampling
from .sampling import choose

# Called with the new tokens as soon as they are known; raising in it stops the loop.
OnTokens = Callable[[Sequence[int]], None]
# Called often while there is no token yet; raising in it stops the prefill.
Check = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Generation:
    """The new token ids, the one that ended the text left out, and when they came."""

    ids: tuple[int, ...]
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        """Speed of the token loop alone: the first token belongs to the prefill."""
        return (len(self.ids) - 1) / self.decode_s if len(self.ids) > 1 and self.decode_s > 0 else 0.0


def generate(
    model: Any, inputs: dict[str, Any], sampling: Sampling, seed: int | None, on_tokens: OnTokens, check: Check
) -> Generation:
    """Continue one prompt until the model ends it or max_new_tokens is reached.

    Args:
        model: a transformers model.
        inputs: keywords of its generate(); input_ids (1, L).
        seed: seeds the run's own generator; None where sampling is greedy.
        on_tokens: called in this thread after every token.
        check: called in this thread before every layer of the prefill, the vision tower's too.

    Raises:
        Whatever on_tokens and check raise, at the token or layer at which they do.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    random = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    watch = _Watch(inputs["input_ids"].shape[1], _end_ids(model), on_tokens)
    hooks = [layer.register_forward_pre_hook(lambda *_: check()) for layer in _layers(model)]
    watch.at_first_token = lambda: _remove(hooks)
    try:
        model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            logits_processor=LogitsProcessorList([_Chooser(sampling, random)]),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    finally:
        _remove(hooks)
    return watch.generation()


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The transformer layers of the text stack and of the vision tower."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.endswith((".layers", ".blocks")):
            yield from module


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()


class _Chooser:
    """Our sampling in generate()'s place: everything but the chosen token is masked, and arg-max takes what is left.

    generate()'s own sampling draws from torch's global generator, which other nodes seed and use.
    """

    def __init__(self, sampling: Sampling, random: torch.Generator | None) -> None:
        self._sampling = sampling
        self._random = random

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = choose(scores, input_ids, self._sampling, self._random)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


class _Watch:
    """A stopping criterion that never stops: generate() calls it once a token, which is where times are taken."""

    def __init__(self, prompt_tokens: int, end_ids: frozenset[int], on_tokens: OnTokens) -> None:
        self._prompt_tokens = prompt_tokens
        self._end_ids = end_ids
        self._on_tokens = on_tokens
        self.at_first_token: Callable[[], None] = lambda: None
        self._ids: list[int] = []
        self._start = self._first = self._last = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        # .tolist() waits for the device, so the times are those of finished tokens.
        new = input_ids[0, self._prompt_tokens + len(self._ids) :].tolist()
        self._last = time.perf_counter()
        if not self._ids:
            self._first = self._last
            self.at_first_token()
        self._ids += new
        self._on_tokens([token for token in new if token not in self._end_ids])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def generation(self) -> Generation:
        ended = bool(self._ids) and self._ids[-1] in self._end_ids
        ids = tuple(self._ids[:-1] if ended else self._ids)
        return Generation(ids, self._first - self._start, self._last - self._first)


def _end_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    return frozenset(ids if isinstance(ids, list) else [ids])
