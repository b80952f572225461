"""Writes a request as a chat completion: messages, pictures as data URLs, sampling parameters by engines' names."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..loading.loader import PICTURE_PIXELS
from ..media.content import Picture, rgb
from ..media.media import Video
from ..models.engines import Engine
from ..models.families import family_of
from ..request import Request, Sampling
from ..settings import AS_SET, AUTO, RESOLUTIONS, SETTINGS, Setting, settings_of
from .kinds import DOUBTFUL, IGNORES

# Fields of a chat completion -> the settings that they come from.
FIELDS = {setting.engine: setting for setting in SETTINGS.values() if setting.engine}
# A field's second name, under which it is sent too: llama.cpp and LM Studio ignore the first name silently.
ALSO = {"repetition_penalty": "repeat_penalty", "thinking_token_budget": "thinking_budget_tokens"}
# Fields that every engine knows.
_KNOWN = {"temperature", "max_tokens"}
# Fields that an engine need not know. If it refuses one, it is asked again without it.
MAY_DROP = {*FIELDS, *ALSO.values(), "stream_options"} - _KNOWN
# Engines hold seeds in signed 64 bits.
_SEEDS = 1 << 63
# Control tokens, which give a prompt its structure, as all Qwen families write them.
_CONTROL = re.compile(r"<(?=\|[^|<>\s]+\|>|/?(?:think|tool_call|tool_response)>)")
_ZERO_WIDTH_SPACE = "\u200b"
# Side, in pixels, of the square that becomes one token, if the family is not known. A wrong guess costs only a second,
# small scaling.
_PATCH = 32


def plain(text: str) -> str:
    """Make the control tokens in a text harmless. Pure.

    A local model gets such a token as plain letters. An engine reads text and control tokens from the same string, so
    each gets a zero-width space inside: the letters stay, and the engine reads no token.
    """
    return _CONTROL.sub(f"<{_ZERO_WIDTH_SPACE}", text)


def body(engine: Engine, request: Request, seed: int | None, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Build the request's body. Pure.

    Args:
        seed: None if sampling is greedy.
        parts: message parts that come before the text.
    """
    text = plain(request.text)
    # Text models have templates that take the content as a string only.
    content: Any = [*parts, {"type": "text", "text": text}] if parts else text
    messages = [{"role": "system", "content": plain(request.system)}] if request.system else []
    return {
        "model": engine.model,
        "messages": [*messages, {"role": "user", "content": content}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **_sampling(request, seed),
    }


def _sampling(request: Request, seed: int | None) -> dict[str, Any]:
    own = request.sampling
    values = {setting.name: getattr(own, setting.attribute) for setting in settings_of(Sampling)} | {
        "max_new_tokens": own.longest,
        "seed": None if seed is None else seed % _SEEDS,
        "stop": list(own.stop),
        "thinking": None if request.thinking == "auto" else {"enable_thinking": request.thinking == "on"},
    }
    fields = {}
    for name, setting in FIELDS.items():
        is_off = values[setting.name] in (None, [], setting.off) or (own.greedy and setting.drawn)
        if _is_sent(setting, request, is_off):
            fields[name] = _off(setting) if is_off else values[setting.name]
    return fields | {also: fields[name] for name, also in ALSO.items() if name in fields}


def _is_sent(setting: Setting, request: Request, is_off: bool) -> bool:
    """Tell if a field is sent. One that is off is sent too if the engine would else use the makers' value."""
    if setting.makers:
        return request.sampling_from == AS_SET
    return setting.always or not is_off


def _off(setting: Setting) -> Any:
    """Return the value that an engine takes for off."""
    return setting.off if setting.engine_off is None else setting.engine_off


def doubtful(sent: dict[str, Any], unknown: set[str]) -> list[str]:
    """List the fields that make a difference and that the engine may ignore silently. Pure.

    An engine that has refused an unknown field ignores none.
    """
    fields = (name for name, setting in FIELDS.items() if name in DOUBTFUL and _counts(setting, sent.get(name)))
    return [] if unknown - {"stop", "stream_options"} else list(fields)


def without_effect(request: Request, sent: dict[str, Any], unknown: set[str], kind: str = "") -> list[str]:
    """Write a sentence for each setting of the request that has no effect on the engine. Pure.

    Args:
        sent: the request's body.
        unknown: its fields that the engine did not know.
        kind: the kind of engine, a key of IGNORES; "" if it is not known.
    """
    spec, own = request.load, request.sampling
    sentences = []
    if (spec.quantization, spec.device) != ("none", AUTO) or spec.attention not in ("sdpa", "auto"):
        sentences.append("quantization, attention_mode and device have no effect: the model is loaded by the engine")
    if request.sampling_from != AS_SET:
        sentences.append("the sampling is the engine's own, whose values are not known here")
    # Answers are cut before a stop here, even if the engine does not know the field.
    not_known = {name for name in unknown - {"stop"} if ALSO.get(name, name) in unknown}
    lost = [field.name for name, field in FIELDS.items() if name in not_known and _counts(field, sent.get(name))]
    if lost:
        sentences.append(f"the engine does not know {', '.join(lost)}")
    maybe = doubtful(sent, unknown)
    passed_over = [FIELDS[name].name for name in maybe if name in IGNORES.get(kind, ())]
    if passed_over:
        sentences.append(f"{kind} ignores {', '.join(passed_over)}")
    unsure = [FIELDS[name].name for name in maybe if not kind and name != "thinking_token_budget"]
    if unsure:
        sentences.append(f"the engine does not say what kind it is, and may ignore {', '.join(unsure)}")
    if own.thinking_budget and "thinking_budget" not in (*lost, *passed_over):
        sentences.append("the thinking budget is the engine's to keep, which not every engine does")
    for setting in settings_of(Sampling):
        if not setting.engine and setting.off is not None and getattr(own, setting.attribute) != setting.off:
            sentences.append(f"{setting.name} has no effect: engines have nothing like it")
    return sentences


def _counts(setting: Setting, sent: Any) -> bool:
    """Tell if it makes a difference that an engine ignores what it was sent."""
    return sent is not None and sent != _off(setting)


def shown(engine: Engine, request: Request, pictures: Sequence[Picture], videos: Sequence[Video]) -> Iterator[Any]:
    """Yield the message parts of pictures and videos, in the order in which a local model sees them.

    They come one at a time, because encoding takes a while.
    """
    budget, patch = _budget(engine, request), family_of(engine.family).patch or _PATCH
    for picture in pictures:
        yield _image(scaled(rgb(picture), budget, patch))
    for video in videos:
        if engine.video_url:
            yield {"type": "video_url", "video_url": {"url": _data_url("video/mp4", _film(video))}}
            continue
        for frame, time_s in zip(video.frames, video.times_s, strict=True):
            # The notation in which Qwen3-VL gets the times of a video.
            yield {"type": "text", "text": f"<{time_s:.1f} seconds>"}
            yield _image(Image.fromarray(frame))


def seen_sizes(engine: Engine, request: Request, pictures: Sequence[Picture]) -> tuple[tuple[int, int], ...]:
    """Return (width, height) at which the engine's model sees each picture; () if its family is not known."""
    patch = family_of(engine.family).patch
    return tuple(seen_size(*picture.size, _budget(engine, request), patch) for picture in pictures) if patch else ()


def _budget(engine: Engine, request: Request) -> tuple[int, int]:
    """Return the least and the most pixels of a picture."""
    return RESOLUTIONS[request.image_resolution] or engine.pixels or PICTURE_PIXELS


def seen_size(width: int, height: int, budget: tuple[int, int], factor: int) -> tuple[int, int]:
    """Return the (width, height) to which Qwen's processors scale a picture. Pure.

    Args:
        budget: the least and the most pixels.
        factor: sides are rounded to multiples of it.
    """
    low, high = budget
    rounded = _rounded(width, height, factor)
    pixels = math.prod(rounded)
    if low <= pixels <= high:
        return rounded
    ratio = math.sqrt((high if pixels > high else low) / (width * height))
    whole = math.floor if pixels > high else math.ceil
    across, down = (max(factor, whole(side * ratio / factor) * factor) for side in (width, height))
    return across, down


def _rounded(width: int, height: int, factor: int) -> tuple[int, int]:
    return max(1, round(width / factor)) * factor, max(1, round(height / factor)) * factor


def scaled(picture: Image.Image, budget: tuple[int, int], factor: int) -> Image.Image:
    """Scale a picture outside the budget to the size that a local model would see.

    A picture within the budget stays as it is: the engine rounds its sides as a local processor does. Scaling uses the
    processor's arithmetic, so the engine sees the same pixels.

    Args:
        budget, factor: see seen_size.
    """
    across, down = seen_size(*picture.size, budget, factor)
    if (across, down) == _rounded(*picture.size, factor):
        return picture
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).unsqueeze(0)
    larger = torch.nn.functional.interpolate(
        pixels, [down, across], mode="bicubic", align_corners=False, antialias=True
    )
    return Image.fromarray(larger[0].permute(1, 2, 0).contiguous().numpy())


def _image(picture: Image.Image) -> dict[str, Any]:
    """Pack a picture without loss, so that the engine sees the same pixels, and quickly, because networks are fast."""
    packed = io.BytesIO()
    picture.save(packed, "PNG", compress_level=1)
    return {"type": "image_url", "image_url": {"url": _data_url("image/png", packed.getvalue())}}


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _film(video: Video) -> bytes:
    """Encode the sampled frames as an MP4 file that shows each at its time."""
    import av

    height, width = (side - side % 2 for side in video.frames.shape[1:3])  # what yuv420p can hold
    packed = io.BytesIO()
    with av.open(packed, "w", format="mp4") as container:
        rate = max(1, round(1000 * len(video.frames) / max(video.duration_s, 0.001)))
        stream = container.add_stream("libx264", rate=Fraction(rate, 1000), options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time_s in zip(video.frames, video.times_s, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels[:height, :width].copy(), format="rgb24")
            frame.pts, frame.time_base = round(time_s * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return packed.getvalue()
