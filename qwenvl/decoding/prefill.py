"""The prompt goes through transformers' own forward, eager: vision tower, deepstack and positions as they are."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .kv_cache import KVCache
from .own_step import text_stack

# Called often while there is no token yet; raising in it stops the prefill.
Check = Callable[[], None]
# How many layers of a prompt the host sends to a GPU before it waits for the first: enough that the GPU never waits.
LAYERS_AHEAD = 4
# In tokens or patches: of shorter ones all layers together take a moment.
LONG_PROMPT = 2048
# Keywords of a transformers model's generate(): input_ids and attention_mask (B, L), padded on the left, and what the
# processor made of pictures and videos.
Inputs = dict[str, torch.Tensor]


class Forwarded(NamedTuple):
    """What comes of a prompt's way through transformers' forward.

    Attributes:
        cache: transformers', of the whole prompt.
        logits: the last ones, (B, V) float32.
        offset: (B,) int64, the rotary position of each row's next token less the number of its tokens.
    """

    cache: Any
    logits: torch.Tensor
    offset: torch.Tensor


class Prefill(NamedTuple):
    """A prompt that is in a buffer: how many of its tokens were there already, and the last logits, (B, V)."""

    reused_tokens: int
    logits: torch.Tensor


def forward(model: Any, inputs: Inputs) -> Forwarded:
    """The whole prompt.

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
    # The last token is text, which has one position on every axis.
    last = positions[0].reshape(-1, *positions[0].shape[-2:])[0, :, -1]
    return Forwarded(cache_of(made), keep.logits, last + 1 - inputs["attention_mask"].sum(1))


def extend(model: Any, ids: torch.Tensor, kv: KVCache, known: int) -> Forwarded:
    """The rest of a prompt of which the first `known` tokens are in the buffer; text only from there on.

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
    made = model(
        input_ids=ids[:, known:],
        attention_mask=torch.ones_like(ids),
        position_ids=positions,
        **named_cache(model, cache),
        use_cache=True,
        logits_to_keep=1,
    )
    return Forwarded(cache_of(made), made.logits[:, -1].float(), kv.offset.clone())


def named_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword for it of the model's forward: `cache` from transformers 5.24 on, `past_key_values` before."""
    return {_cache_keyword(type(model).forward): cache}


def cache_of(made: Any) -> Any:
    """The cache in what forward or generate() returned; where the new name is there, the old one warns."""
    return made["cache" if "cache" in made else "past_key_values"]


@functools.lru_cache(maxsize=32)
def _cache_keyword(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


@contextmanager
def checked(model: torch.nn.Module, check: Check) -> Iterator[Callable[[], None]]:
    """Within the block, check is called before every transformer layer, and on a CPU before every part of one.

    Yields:
        What ends it early, after the prompt. On a CPU, where a token can take a second, the layers are still checked.
    """
    lists = [m for name, m in model.named_modules() if name.endswith((".layers", ".blocks"))]
    layers = [layer for each in lists if isinstance(each, torch.nn.ModuleList) for layer in each]
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
    """A hook that looks for a cancel, and lets the host be few layers ahead of a GPU: what it has sent is computed in
    any case, which is seconds of a long prompt."""

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
    """A logits processor that only looks."""

    logits: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores
        return scores
