"""Request -> chat template -> model inputs on the device, of one question and of several side by side."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..decoding.prefill import Inputs
from ..errors import UnusableError, WrappedErrors
from ..loading.consistency import why_unfit
from ..loading.devices import cancellable
from ..loading.loader import ModelHandle
from ..loading.template import written
from ..media.media import Video, fingerprint
from ..request import Request
from ..settings import RESOLUTIONS
from .answer import THINK_START

# What a chat template calls its own switch for thinking.
_SWITCH = "enable_thinking"
# In the model's precision. The seconds between a video's frames are not: bfloat16 cannot tell 300 from 301.
PIXELS = ("pixel_values", "pixel_values_videos")
# A code point that Unicode reserves for a program's own use and that no text may hold.
_BREAK = "\ufdd0"


class PromptError(ValueError):
    """A question that this model cannot be asked."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given: generate()'s keywords, on the device. It `thinks` where <think> is open already."""

    inputs: Inputs
    thinks: bool = False
    number: int = 0  # of the question
    # (width, height) of each picture as the model sees it.
    sizes: tuple[tuple[int, int], ...] = ()
    # Names what is seen, and holds it. Large pictures take a while, and only a question that is asked alone needs it.
    media_name: Callable[[], str] = str

    @property
    def media(self) -> str:
        """Equal for equal pictures and videos in equal sizes only."""
        return self.media_name()

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def continued(self, ids: Sequence[int]) -> Prompt:
        """The same with more text after it."""
        more = self.inputs["input_ids"].new_tensor([ids])
        shape = self.inputs["input_ids"].shape
        longer = {key: _widened(key, value, more) for key, value in self.inputs.items() if _like(value, shape)}
        return replace(self, inputs={**self.inputs, **longer}, thinks=False)


def seen_sizes(inputs: Mapping[str, Any], patch_size: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of each picture in pixels, as the processor scaled it, in their order. Pure.

    Args:
        inputs: the processor's; their image_grid_thw counts patches.
        patch_size: side of a patch in pixels.
    """
    grid = inputs.get("image_grid_thw")
    rows = [] if grid is None else grid.tolist()
    return tuple((width * patch_size, height * patch_size) for _, height, width in rows)


def require_question(request: Request) -> None:
    """Raise PromptError where there is nothing at all to answer."""
    if not (request.shows_something or request.text.strip() or request.system.strip()):
        raise PromptError("There is nothing to answer: the text is empty, and no image or video is connected.")


def why_no_switch(handle: ModelHandle, request: Request) -> str | None:
    """The reason why `thinking` has no effect, or None."""
    if request.thinking == "auto" or _SWITCH in str((handle.processor or handle.tokenizer).chat_template):
        return None
    return (
        f"thinking {request.thinking!r} has no effect: the chat template of {request.load.model} has no switch for it"
    )


def encode(
    handle: ModelHandle,
    request: Request,
    pictures: Sequence[Image.Image],
    videos: Sequence[Video] | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
    number: int = 0,
    alone: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Prompt:
    """Pictures first, then videos, then the text, in one user turn after the system prompt.

    Args:
        phase: a block that times one of the parts "template", "processor" and "transfer".
        number: of the question.
        alone: the next run may find what is seen in memory; otherwise the pictures are held no longer.
        check: raises to cancel.

    Raises:
        PromptError: the model cannot see and there is something to look at, or the question is too long for it.
        UnusableError: the model's chat template, processor or configuration fails.
    """
    videos = videos or ()
    if (pictures or videos) and handle.processor is None:
        raise PromptError(
            f"{request.load.model} is a text model and cannot see pictures or videos. "
            "Pick one of the vision models in the QwenVL node's list."
        )
    name = request.load.model
    with phase("template"), WrappedErrors(f"The chat template of {name} cannot be used", UnusableError):
        text = _render(handle, request, len(pictures), len(videos), check)
    unusable = WrappedErrors(f"The tokenizer or processor of {name} cannot be used", UnusableError)
    with phase("processor"), unusable, cancellable(check):
        inputs = _tokenize(handle, text, pictures, videos, request.image_resolution)
    if _BREAK in text:
        inputs = _without(inputs, handle.tokenizer.encode(_BREAK, add_special_tokens=False))
    with WrappedErrors(f"The config.json of {name} cannot be used", UnusableError):
        _require_context(handle, request, inputs["input_ids"].shape[1])
    device, dtype = handle.model.device, handle.model.dtype
    with phase("transfer"):
        moved = {key: _to(value, device, dtype if key in PIXELS else None) for key, value in inputs.items()}
    media_name = _naming(request.image_resolution, pictures, videos) if alone else partial(str, secrets.token_hex(8))
    sizes = seen_sizes(inputs, handle.processor.image_processor.patch_size) if pictures else ()
    return Prompt(moved, text.rstrip().endswith(THINK_START), number, sizes, media_name)


def _require_context(handle: ModelHandle, request: Request, tokens: int) -> None:
    """A prompt beyond the model's positions would take long and give nothing that makes sense."""
    config = handle.model.config.get_text_config()
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    most = getattr(config, "max_position_embeddings", None) or tokens
    # YaRN stretches them. float() of what is no number fails; times a number it may be gigabytes of text.
    original, factor = scaling.get("original_max_position_embeddings") or most, scaling.get("factor") or 1
    longest = max(most, round(float(original) * float(factor)))
    if tokens > longest:
        raise PromptError(
            f"The question has {tokens:,} tokens, and {request.load.model} reads {longest:,} at most. "
            "Shorten the text, or show fewer or smaller pictures."
        )


def _naming(resolution: str, pictures: Sequence[Image.Image], videos: Sequence[Video]) -> Callable[[], str]:
    # The same picture in another size is another to the model.
    return lambda: f"{resolution} {fingerprint(pictures, videos)}"


def side_by_side(prompts: Sequence[Prompt], dtype: torch.dtype | None = None) -> Inputs:
    """generate()'s keywords for several questions: one row each, padded on the left. Pure.

    Args:
        dtype: of the model, where it may be another than the questions were encoded for.
    """
    longest = max(prompt.tokens for prompt in prompts)
    parts: dict[str, list[Any]] = {}
    for prompt in prompts:
        shape = prompt.inputs["input_ids"].shape
        for key, value in prompt.inputs.items():
            # 0 is a token like any other; the mask, which is 0 there too, hides it.
            padded = torch.nn.functional.pad(value, (longest - shape[1], 0)) if _like(value, shape) else value
            parts.setdefault(key, []).append(padded)
    joined = {key: _joined(values) for key, values in parts.items()}
    return joined | {key: _to(joined[key], joined[key].device, dtype) for key in PIXELS if dtype and key in joined}


def media_of(prompts: Sequence[Prompt]) -> str:
    """Names what is seen, where one question is asked alone: only then is anything of it found in memory again."""
    return prompts[0].media if len(prompts) == 1 else ""


def break_control_tokens(text: str, control_tokens: Sequence[str]) -> str:
    """Put a break into each control token a user typed, so that it is tokenized as the text that it is. Pure."""
    for token in control_tokens:
        text = text.replace(token, f"{token[0]}{_BREAK}{token[1:]}")
    return text


def _render(handle: ModelHandle, request: Request, pictures: int, videos: int, check: Callable[[], None]) -> str:
    control = list(handle.tokenizer.get_added_vocab())
    system, text = (break_control_tokens(each, control) for each in (request.system, request.text))
    shown = [{"type": "image"}] * pictures + [{"type": "video"}] * videos
    messages = [_message(handle, "system", system)] if system else []
    messages.append(_message(handle, "user", text, shown))
    # A template that does not know the switch ignores it; left out, it does as the model's makers chose.
    switch = {} if request.thinking == "auto" else {_SWITCH: request.thinking == "on"}
    return written(
        (handle.processor or handle.tokenizer), handle.tokenizer, messages, check, add_generation_prompt=True, **switch
    )


def _message(handle: ModelHandle, role: str, text: str, shown: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """Templates of text models take a string, those of vision models a list of parts."""
    return {"role": role, "content": text if handle.processor is None else [*shown, {"type": "text", "text": text}]}


def _tokenize(
    handle: ModelHandle, text: str, pictures: Sequence[Image.Image], videos: Sequence[Video], resolution: str
) -> Inputs:
    if handle.processor is None:
        return dict(handle.tokenizer(text, return_tensors="pt"))
    if videos and (reason := why_unfit(handle.processor.video_processor, handle.model.config.vision_config)):
        raise UnusableError(f"Videos cannot be shown to this model: {reason}.")
    videos = [_in_pairs(video) for video in videos]
    given: dict[str, Any] = {"text": [text]}
    if pictures:
        given |= {"images": list(pictures), "images_kwargs": _size(handle.processor.image_processor, resolution)}
    if videos:
        given |= {
            "videos": [torch.from_numpy(video.frames).permute(0, 3, 1, 2) for video in videos],
            "videos_kwargs": _timing(videos),
        }
    inputs = handle.processor(return_tensors="pt", **given)
    if "second_per_grid_ts" in inputs:
        # Qwen2.5-VL's. Version 5 of transformers has them from the metadata, version 4 all of them from one rate.
        joined = handle.processor.video_processor.temporal_patch_size
        rates = [len(video.frames) / max(video.duration_s, 0.001) for video in videos]  # sampled frames a second
        inputs["second_per_grid_ts"] = torch.tensor([joined / rate for rate in rates])
    return {key: value for key, value in inputs.items() if key != "video_metadata"}


def _size(images: Any, resolution: str) -> dict[str, Any]:
    """The picture size as keywords of one call, so that nothing of it is left behind. Always a new dict: version 4 of
    transformers empties it."""
    pixels = RESOLUTIONS[resolution]
    if pixels is None:
        return {}
    low, high = pixels
    size: dict[str, Any] = {"size": {"shortest_edge": low, "longest_edge": high}}
    # Version 4 prefers these where the model's folder sets them; version 5 knows them as older names.
    if getattr(images, "max_pixels", None):
        size |= {"min_pixels": low, "max_pixels": high}
    return size


def _timing(videos: Sequence[Video]) -> dict[str, Any]:
    """Tell the processor when each frame was, to the millisecond: as if the videos had 1,000 frames a second."""
    metadata = [
        {
            "fps": 1000.0,
            "total_num_frames": max(1, round(video.duration_s * 1000)),
            "duration": video.duration_s,
            "frames_indices": [round(time * 1000) for time in video.times_s],
        }
        for video in videos
    ]
    return {"video_metadata": metadata, "do_sample_frames": False}


def _in_pairs(video: Video) -> Video:
    """A single frame twice: processors join two and take no fewer."""
    if len(video.frames) > 1:
        return video
    return replace(video, frames=video.frames.repeat(2, axis=0), times_s=video.times_s * 2)


def _without(inputs: Inputs, ids: list[int]) -> Inputs:
    """Take every run of the ids out of the prompt, together with its column in whatever is as long as the prompt."""
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
    """What is as long as the prompt, for that much more text."""
    added = {"input_ids": more, "attention_mask": torch.ones_like(more)}.get(key, torch.zeros_like(more))
    return torch.cat([value, added.to(value.dtype)], 1)


def _joined(values: list[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return [part for value in values for part in value]


def _to(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    return value.to(device, dtype) if isinstance(value, torch.Tensor) else value
