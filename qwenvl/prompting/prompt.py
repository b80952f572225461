"""The prompt: from a request by the chat template to a model's inputs on its device, for one or several questions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..decoding.prefill import Inputs
from ..errors import UnusableError, WrappedErrors
from ..loading.devices import cancellable
from ..loading.loader import ModelHandle
from ..loading.template import written
from ..media.content import Film, Picture, convert
from ..request import Request
from .answer import THINK_START
from .processed import PIXELS, LaterPixels, Shown, later_pixels, recall, recognises, remember, to, tokenize, unusable

# The name of the switch for thinking in chat templates.
_SWITCH = "enable_thinking"
# A code point that Unicode reserves for a program's internal use, so that no text should hold it.
_BREAK = "\ufdd0"


class PromptError(ValueError):
    """A question that this model cannot answer: it is empty, too long, or about pictures that the model cannot see."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A model's inputs for question `number`: generate()'s keywords, on the device. `thinks` after an open <think>."""

    inputs: Inputs
    thinks: bool = False
    number: int = 0
    # (width, height) in pixels of each picture as the model sees it.
    sizes: tuple[tuple[int, int], ...] = ()
    # A text that is equal only for equal pictures and videos in equal sizes.
    media: str = ""

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def continued(self, ids: Sequence[int]) -> Prompt:
        """Return the prompt with more text after it, given as token ids; `thinks` is then False."""
        more = self.inputs["input_ids"].new_tensor([ids])
        shape = self.inputs["input_ids"].shape
        later = self.inputs if isinstance(self.inputs, LaterPixels) else None
        known = later.known if later else self.inputs
        longer = {key: _widened(key, value, more) for key, value in known.items() if _like(value, shape)}
        return replace(self, inputs=later.changed(longer) if later else {**known, **longer}, thinks=False)


def seen_sizes(inputs: Mapping[str, Any], patch_size: int) -> tuple[tuple[int, int], ...]:
    """Return (width, height) in pixels of each picture, in order, as the processor scaled it.

    Args:
        inputs: the processor's output; its image_grid_thw counts patches.
        patch_size: side of a patch in pixels.
    """
    grid = inputs.get("image_grid_thw")
    rows = [] if grid is None else grid.tolist()
    return tuple((width * patch_size, height * patch_size) for _, height, width in rows)


def require_question(request: Request) -> None:
    """Raise PromptError if the request has neither text nor pictures nor videos."""
    if not (request.shows_something or request.text.strip() or request.system.strip()):
        raise PromptError("There is nothing to answer: the text is empty, and no image or video is connected.")


def why_no_switch(handle: ModelHandle, request: Request) -> str | None:
    """Return the reason why the setting `thinking` has no effect, or None."""
    if request.thinking == "auto" or _SWITCH in str((handle.processor or handle.tokenizer).chat_template):
        return None
    return (
        f"thinking {request.thinking!r} has no effect: the chat template of {request.load.model} has no switch for it"
    )


def encode(
    handle: ModelHandle,
    request: Request,
    pictures: Sequence[Picture],
    videos: Sequence[Film] | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    number: int = 0,
    alone: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Prompt:
    """Encode a question: pictures, then videos, then the text, in one user turn after the system prompt.

    Args:
        phase: returns a context manager that times one of the parts "template", "media", "processor" and "transfer".
        number: the question's number.
        alone: True if the question is asked alone, so that the next one may be about pictures that are recognised.
        check: called often; raises to cancel.

    Raises:
        PromptError: there are pictures or videos and the model cannot see, or the question is too long for it.
        UnusableError: the model's chat template, processor or configuration fails.
    """
    shown = Shown(pictures, videos or (), request.image_resolution)
    if (pictures or videos) and handle.processor is None:
        raise PromptError(
            f"{request.load.model} is a text model and cannot see pictures or videos. "
            "Pick one of the vision models in the QwenVL node's list."
        )
    name = request.load.model
    with phase("template"), WrappedErrors(f"The chat template of {name} cannot be used", UnusableError):
        text = _render(handle, request, len(shown.pictures), len(shown.films), check)
    with phase("media"):
        media = shown.name() if alone and recognises(handle.decoder) else secrets.token_hex(8)
        rest = recall(handle.decoder, media)
        if rest is None:
            convert(shown.pictures, shown.films, check)
    with phase("processor"), unusable(name), cancellable(check):
        inputs, made = tokenize(handle, text, shown, rest)
    if alone:
        remember(handle.decoder, media, made)
    if _BREAK in text:
        inputs = _without(inputs, handle.tokenizer.encode(_BREAK, add_special_tokens=False))
    with WrappedErrors(f"The config.json of {name} cannot be used", UnusableError):
        _require_context(handle, request, inputs["input_ids"].shape[1])
    device, dtype = handle.model.device, handle.model.dtype
    with phase("transfer"):
        moved = {key: to(value, device, dtype if key in PIXELS else None) for key, value in inputs.items()}
    sizes = seen_sizes(inputs, handle.processor.image_processor.patch_size) if pictures else ()
    complete: Inputs = later_pixels(handle, text, shown, moved, check) if rest else moved
    return Prompt(complete, text.rstrip().endswith(THINK_START), number, sizes, media)


def _require_context(handle: ModelHandle, request: Request, tokens: int) -> None:
    """Raise PromptError if the prompt is longer than the model's positions: it would take long and give nonsense."""
    config = handle.model.config.get_text_config()
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    most = getattr(config, "max_position_embeddings", None) or tokens
    # YaRN stretches the positions. float() rejects a text from config.json, which times a number may be gigabytes.
    original, factor = scaling.get("original_max_position_embeddings") or most, scaling.get("factor") or 1
    longest = max(most, round(float(original) * float(factor)))
    if tokens > longest:
        raise PromptError(
            f"The question has {tokens:,} tokens, and {request.load.model} reads {longest:,} at most. "
            "Shorten the text, or show fewer or smaller pictures."
        )


def side_by_side(prompts: Sequence[Prompt], dtype: torch.dtype | None = None) -> Inputs:
    """Join the inputs of several questions: generate()'s keywords, one row for each, padded on the left.

    Args:
        dtype: the model's dtype, if it may differ from the one that the questions were encoded for.
    """
    if len(prompts) == 1 and isinstance(alone := prompts[0].inputs, LaterPixels):
        return alone.of_dtype(dtype) if dtype else alone
    longest = max(prompt.tokens for prompt in prompts)
    parts: dict[str, list[Any]] = {}
    for prompt in prompts:
        shape = prompt.inputs["input_ids"].shape
        for key, value in prompt.inputs.items():
            # Padded with 0, which is an ordinary token, but hidden by the mask, which is 0 there too.
            padded = torch.nn.functional.pad(value, (longest - shape[1], 0)) if _like(value, shape) else value
            parts.setdefault(key, []).append(padded)
    joined = {key: _joined(values) for key, values in parts.items()}
    return joined | {key: to(joined[key], joined[key].device, dtype) for key in PIXELS if dtype and key in joined}


def media_of(prompts: Sequence[Prompt]) -> str:
    """Return `media` of a question that is asked alone; "" for several, of which the next run can reuse nothing."""
    return prompts[0].media if len(prompts) == 1 else ""


def break_control_tokens(text: str, control_tokens: Sequence[str]) -> str:
    """Put a break into every control token that a user typed, so that it is tokenized as plain text."""
    for token in control_tokens:
        text = text.replace(token, f"{token[0]}{_BREAK}{token[1:]}")
    return text


def _render(handle: ModelHandle, request: Request, pictures: int, videos: int, check: Callable[[], None]) -> str:
    control = list(handle.tokenizer.get_added_vocab())
    system, text = (break_control_tokens(typed, control) for typed in (request.system, request.text))
    shown = [{"type": "image"}] * pictures + [{"type": "video"}] * videos
    messages = [_message(handle, "system", system)] if system else []
    messages.append(_message(handle, "user", text, shown))
    # A template without the switch ignores it; without a value, a template uses the default of the model's makers.
    switch = {} if request.thinking == "auto" else {_SWITCH: request.thinking == "on"}
    return written(
        (handle.processor or handle.tokenizer), handle.tokenizer, messages, check, add_generation_prompt=True, **switch
    )


def _message(handle: ModelHandle, role: str, text: str, shown: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """Return a message of the chat template: its content is a string for text models, a list for vision models."""
    return {"role": role, "content": text if handle.processor is None else [*shown, {"type": "text", "text": text}]}


def _without(inputs: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """Remove every occurrence of the sequence of ids from all inputs that are as long as the prompt."""
    row = inputs["input_ids"][0].tolist()
    keep = torch.ones(len(row), dtype=torch.bool)
    for start in range(len(row) - len(ids) + 1):
        if row[start : start + len(ids)] == ids:
            keep[start : start + len(ids)] = False
    shape = inputs["input_ids"].shape
    return {key: value[:, keep] if _like(value, shape) else value for key, value in inputs.items()}


def _like(value: Any, shape: torch.Size) -> bool:
    return getattr(value, "shape", None) == shape


def _widened(key: str, value: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Lengthen an input that is as long as the prompt by the tokens `more`, (1, N)."""
    added = {"input_ids": more, "attention_mask": torch.ones_like(more)}.get(key, torch.zeros_like(more))
    return torch.cat([value, added.to(value.dtype)], 1)


def _joined(values: list[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return [part for value in values for part in value]
