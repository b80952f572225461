"""Request -> chat template -> model inputs on the device; and the model's tokens -> text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .loader import ModelHandle
from .media import Video, fingerprint
from .request import Request

THINK_START, THINK_END = "<think>", "</think>"
# A code point that Unicode reserves for a program's own use and that no text may hold.
_BREAK = "\ufdd0"


class PromptError(ValueError):
    """A question that this model cannot be asked."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given: generate()'s keywords, on the device. It `thinks` where <think> is open already."""

    inputs: dict[str, Any]
    tokens: int
    thinks: bool
    # Names the content of the pictures and the video.
    media: str = ""


def require_question(request: Request) -> None:
    """Raise PromptError where there is nothing at all to answer."""
    if not (request.images or request.video_path or request.text.strip() or request.system.strip()):
        raise PromptError("There is nothing to answer: the text is empty, and no image or video is connected.")


def encode(
    handle: ModelHandle,
    request: Request,
    pictures: list[Image.Image],
    video: Video | None,
    phase: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Prompt:
    """Pictures first, then the video, then the text, in one user turn after the system prompt.

    Args:
        phase: a block that times one of the parts "template", "processor" and "transfer".

    Raises:
        PromptError: the model cannot see and there is something to look at.
    """
    if (pictures or video) and handle.processor is None:
        raise PromptError(
            f"{request.load.model} is a text model and cannot see pictures or videos. "
            "Pick one of the vision models in the QwenVL node's list."
        )
    with phase("template"):
        text = _render(handle, request, len(pictures), video is not None)
    with phase("processor"):
        inputs = _tokenize(handle, text, pictures, video)
    if _BREAK in text:
        inputs = _without(inputs, handle.tokenizer.encode(_BREAK, add_special_tokens=False))
    model = handle.model
    with phase("transfer"):
        moved = {key: _to(value, model.device, model.dtype) for key, value in inputs.items()}
    thinks = text.rstrip().endswith(THINK_START)
    return Prompt(moved, inputs["input_ids"].shape[1], thinks, fingerprint(pictures, video))


def break_control_tokens(text: str, control_tokens: Sequence[str]) -> str:
    """Put a break into each control token a user typed, so that it is tokenized as the text that it is. Pure."""
    for token in control_tokens:
        text = text.replace(token, f"{token[0]}{_BREAK}{token[1:]}")
    return text


def split_thinking(text: str, thinks: bool) -> tuple[str, str | None]:
    """(thinking, answer) of a model's text; the answer is None where the think block was never closed. Pure."""
    opened = text.lstrip().startswith(THINK_START)
    # A stray </think> of a model that was not thinking ends nothing: all before it would be lost.
    if not (opened or thinks):
        return "", text.strip()
    if opened:
        text = text.lstrip().removeprefix(THINK_START)
    thinking, closed, answer = text.partition(THINK_END)
    return thinking.strip(), answer.strip() if closed else None


class TextStream:
    """Tokens in, text out as far as it is certain: a character may be spread over several tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self.tokens = 0
        self.text = ""

    def push(self, ids: Sequence[int]) -> None:
        """Append tokens; `text` grows by what they complete."""
        self.tokens += len(ids)
        self._pending += ids
        piece = self._decode()
        # An unfinished character decodes to U+FFFD; four tokens hold the longest one.
        if not piece.endswith("\ufffd") or len(self._pending) > 4:
            self.text += piece
            self._pending.clear()

    def end(self) -> str:
        """The whole text, an unfinished last character included."""
        self.text += self._decode()
        self._pending.clear()
        return self.text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _render(handle: ModelHandle, request: Request, pictures: int, video: bool) -> str:
    control = list(handle.tokenizer.get_added_vocab())
    system, text = (break_control_tokens(part, control) for part in (request.system, request.text))
    seen = [{"type": "image"}] * pictures + [{"type": "video"}] * video
    messages = [_message(handle, "system", system)] if system else []
    messages.append(_message(handle, "user", text, seen))
    template = handle.processor or handle.tokenizer
    return template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _message(handle: ModelHandle, role: str, text: str, seen: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """Templates of text models take a string, those of vision models a list of parts."""
    content: Any = text if handle.processor is None else [*seen, {"type": "text", "text": text}]
    return {"role": role, "content": content}


def _tokenize(handle: ModelHandle, text: str, pictures: list[Image.Image], video: Video | None) -> dict[str, Any]:
    if handle.processor is None:
        return dict(handle.tokenizer(text, return_tensors="pt"))
    given: dict[str, Any] = {"text": [text]}
    if pictures:
        given["images"] = pictures
    if video:
        given |= {
            "videos": [torch.from_numpy(video.frames).permute(0, 3, 1, 2)],
            "videos_kwargs": _timing(video),
        }
    inputs = handle.processor(return_tensors="pt", **given)
    return {key: value for key, value in inputs.items() if key != "video_metadata"}


def _timing(video: Video) -> dict[str, Any]:
    """Tell the processor when each frame was, to the millisecond: as if the video had 1,000 frames a second."""
    total = max(1, round(video.duration_s * 1000))
    metadata = {
        "fps": 1000.0,
        "total_num_frames": total,
        "duration": video.duration_s,
        "frames_indices": [round(time * 1000) for time in video.times_s],
    }
    # transformers 4 takes the rate of the sampled frames from fps, version 5 from the metadata.
    rate = len(video.frames) / max(video.duration_s, 0.001)
    return {"video_metadata": [metadata], "do_sample_frames": False, "fps": rate}


def _without(inputs: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """Take every run of the ids out of the prompt, together with its column in whatever is as long as the prompt."""
    row = inputs["input_ids"][0].tolist()
    keep = torch.ones(len(row), dtype=torch.bool)
    for start in range(len(row) - len(ids) + 1):
        if row[start : start + len(ids)] == ids:
            keep[start : start + len(ids)] = False
    shape = inputs["input_ids"].shape
    return {key: value[:, keep] if getattr(value, "shape", None) == shape else value for key, value in inputs.items()}


def _to(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)
