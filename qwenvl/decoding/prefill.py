"""The prompt's way through transformers' own forward, uncaptured, with its vision tower, deepstack and positions."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .kv_cache import KVCache
from .own_step import text_stack

# Called often before the first token; the prefill stops if it raises.
Check = Callable[[], None]
# How many layers of a prompt the host sends to a GPU before it waits for the first: enough that the GPU never waits.
LAYERS_AHEAD = 4
# Tokens or patches from which on the host waits for the GPU: the layers of a shorter prompt take no time worth saving.
LONG_PROMPT = 2048
# Keywords of a transformers model's generate(): input_ids and attention_mask (B, L), padded on the left, and the
# processor's tensors of pictures and videos. Pixels may be made only when they are read, which a prompt whose pictures
# are still in the buffer does not do.
Inputs = Mapping[str, torch.Tensor]


class Forwarded(NamedTuple):
    """The result of transformers' forward on a prompt.

    Attributes:
        cache: transformers' cache of the whole prompt.
        logits: those of the last token, (B, V) float32.
        offset: (B,) int64, the rotary position of each row's next token minus the number of its tokens.
    """

    cache: Any
    logits: torch.Tensor
    offset: torch.Tensor


class Prefill(NamedTuple):
    """A prompt stored in the buffer: how many of its tokens were there before, and the last token's logits (B, V)."""

    reused_tokens: int
    logits: torch.Tensor


def forward(model: Any, inputs: Inputs) -> Forwarded:
    """Run the whole prompt by transformers' generate() for one token.

    generate() prepares positions and masks as every family and version needs them. The positions are read from the
    call of the rotary embedding, since versions of transformers count them differently.
    """
    from transformers import LogitsProcessorList

    keep = _KeepLogits()
    positions: list[torch.Tensor] = []
    hook = text_stack(model).rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1]),
        with_kwargs=True,
    )
    try:
        result = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=1,
            use_cache=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([keep]),
        )
    finally:
        hook.remove()
    # The last token is text, which has one position on every axis.
    last = positions[0].reshape(-1, *positions[0].shape[-2:])[0, :, -1]
    return Forwarded(cache_of(result), keep.logits, last + 1 - inputs["attention_mask"].sum(1))


def extend(model: Any, ids: torch.Tensor, kv: KVCache, known: int) -> Forwarded:
    """Run the rest of a prompt whose first `known` tokens are in the buffer; the rest must be text only.

    Args:
        ids: (1, L), the whole prompt.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        cache.update(keys[:, :, :known], values[:, :, :known], layer)
    positions = torch.arange(known, ids.shape[1], device=ids.device)[None] + kv.offset[:, None]
    if hasattr(model.config, "vision_config"):
        # Text has one position on all three axes: time, height and width.
        positions = positions.expand(3, *positions.shape)
    result = model(
        input_ids=ids[:, known:],
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        **named_cache(model, cache),
        use_cache=True,
        logits_to_keep=1,
    )
    return Forwarded(cache_of(result), result.logits[:, -1].float(), kv.offset.clone())


def named_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the cache under its keyword in the model's forward: `cache` from transformers 5.24 on, else
    `past_key_values`."""
    return {_cache_keyword(type(model).forward): cache}


def cache_of(output: Any) -> Any:
    """Return the cache in an output of forward or generate(); in versions with the new name, the old one warns."""
    return output["cache" if "cache" in output else "past_key_values"]


@functools.lru_cache(maxsize=32)
def _cache_keyword(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


@contextmanager
def checked(model: torch.nn.Module, check: Check) -> Iterator[Callable[[], None]]:
    """Call check before every transformer layer within the block, and on a CPU before every part of a layer.

    Yields:
        A function to call after the prompt, which ends the checks early. On a CPU, where a token can take a second,
        check is still called before every layer.
    """
    named = [module for name, module in model.named_modules() if name.endswith((".layers", ".blocks"))]
    layers = [layer for stack in named if isinstance(stack, torch.nn.ModuleList) for layer in stack]
    on_cpu = next(model.parameters()).device.type == "cpu"
    look = _Looks(check)
    kept = [layer.register_forward_pre_hook(look) for layer in layers if on_cpu]
    parts = {part for layer in layers for part in layer.modules()} - set(layers) if on_cpu else layers
    passing = [part.register_forward_pre_hook(look) for part in parts]

    def after_the_prompt() -> None:
        while passing:
            passing.pop().remove()

    try:
        yield after_the_prompt
    finally:
        for hook in (*passing, *kept):
            hook.remove()


class _Looks:
    """A hook that calls check, and keeps the host at most LAYERS_AHEAD layers ahead of a GPU.

    Layers that were sent are computed even after a cancel: for a long prompt that would be seconds.
    """

    def __init__(self, check: Check) -> None:
        self._check = check
        self._sent: deque[Any] = deque()

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._check()
        if args and isinstance(args[0], torch.Tensor) and _takes_long(args[0]):
            done = torch.cuda.Event(blocking=True)
            done.record(torch.cuda.current_stream(args[0].device))
            self._sent.append(done)
            if len(self._sent) > LAYERS_AHEAD:
                self._sent.popleft().synchronize()


def _takes_long(hidden: torch.Tensor) -> bool:
    return hidden.device.type == "cuda" and hidden.shape[:-1].numel() >= LONG_PROMPT


class _KeepLogits:
    """A logits processor that keeps the logits and changes nothing."""

    logits: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores
        return scores
