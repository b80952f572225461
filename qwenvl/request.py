"""The data of the pipeline: a Request goes in, a Result comes out. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .checks import InvalidSettingError, shown, text_of
from .settings import ALL_GPUS, ALL_GPUS_AND_CPU, AUTO, MODELS_OWN, check, default, settings_of, values_of

_DEVICE = re.compile(rf"{AUTO}|{ALL_GPUS}|{ALL_GPUS_AND_CPU}|cpu|mps|(cuda|xpu):\d+")


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """Everything that decides which weights sit in memory: the cache key."""

    model: str
    quantization: str = default("quantization")
    attention: str = default("attention_mode")
    device: str = default("device")

    def __post_init__(self) -> None:
        text_of("model", self.model)
        check(self)
        if not (isinstance(self.device, str) and _DEVICE.fullmatch(self.device)):
            raise InvalidSettingError(f"device must be like auto, cpu, cuda:0 or all GPUs, got {shown(self.device)}.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> LoadSpec:
        """Build it from values by the settings' names; missing ones take their defaults."""
        return cls(**values_of(cls, values))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when an answer ends. settings.py holds the value that switches each off."""

    do_sample: bool = default("do_sample")
    temperature: float = default("temperature")
    top_p: float = default("top_p")
    top_k: int = default("top_k")
    min_p: float = default("min_p")
    repetition_penalty: float = default("repetition_penalty")
    max_new_tokens: int = default("max_new_tokens")
    seed: int = default("seed")
    presence_penalty: float = default("presence_penalty")
    frequency_penalty: float = default("frequency_penalty")
    no_repeat_ngram_size: int = default("no_repeat_ngram_size")
    min_new_tokens: int = default("min_new_tokens")
    # The most tokens of thinking; max_new_tokens then counts the answer alone. 0 is no limit.
    thinking_budget: int = default("thinking_budget")
    # The answer ends before the first of these.
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidSettingError(f"stop must be a list of texts that are not empty, got {shown(self.stop)}.")

    def with_own(self, own: Mapping[str, Any]) -> Sampling:
        """Return a copy with the values that a model's makers recommend; those that they do not name stay.

        Args:
            own: values by name. One outside the setting's range becomes the nearest inside, as a top_k of -1 for off.
        """
        known = [(setting, own[setting.name]) for setting in _NUMBERS if isinstance(own.get(setting.name), int | float)]
        # value == value leaves out NaN.
        given: dict[str, Any] = {setting.name: setting.nearest(value) for setting, value in known if value == value}
        return replace(self, **given, do_sample=bool(own.get("do_sample", self.do_sample)))

    def __str__(self) -> str:
        if self.greedy:
            return "greedy"
        return ", ".join(f"{number.name} {getattr(self, number.name):g}" for number in _NUMBERS if number.makers)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken, so that the seed has no effect."""
        return not self.do_sample or self.temperature == 0

    @property
    def longest(self) -> int:
        """The most tokens of one answer, its thinking included."""
        return self.max_new_tokens + self.thinking_budget


_NUMBERS = [setting for setting in settings_of(Sampling) if setting.span]


@dataclass(frozen=True, slots=True)
class Frames:
    """Which frames of videos the model sees, and at what size."""

    # Frames a second that the model sees.
    sample_fps: float = default("sample_fps")
    max_frames: int = default("max_frames")
    max_frame_pixels: int = default("max_frame_pixels")
    # The most tokens of all videos of a question together.
    max_video_tokens: int = default("max_video_tokens")
    # Frames a second of video_frames, which holds no times of its own.
    fps: float = default("fps")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Request:
    """One question. `images` maps the input's name, which errors repeat, to an IMAGE tensor or a picture file.

    The model sees the images first, then video_frames, then video, then the file at video_path.
    """

    load: LoadSpec
    text: str
    system: str = ""
    images: Mapping[str, Any] = field(default_factory=dict)
    video_path: str = ""
    sampling: Sampling = Sampling()
    release: str = default("release")
    diagnostics: str = default("diagnostics")
    image_mode: str = default("image_mode")
    image_resolution: str = default("image_resolution")
    # An IMAGE batch that is a video.
    video_frames: Any = None
    # ComfyUI's VIDEO, or any object with its get_stream_source().
    video: Any = None
    frames: Frames = Frames()
    thinking: str = default("thinking")
    download: str = default("download")
    sampling_from: str = default("sampling")

    def __post_init__(self) -> None:
        check(self)
        for name in ("text", "system"):
            object.__setattr__(self, name, text_of(name, getattr(self, name)))

    @classmethod
    def of(cls, values: Mapping[str, Any], images: Mapping[str, Any]) -> Request:
        """Build it from values by the settings' names; missing ones take their defaults, other names are ignored."""
        return cls(
            load=LoadSpec.of(values),
            images=images,
            sampling=Sampling(**values_of(Sampling, values)),
            frames=Frames(**values_of(Frames, values)),
            **values_of(cls, values),
        )

    @property
    def shows_something(self) -> bool:
        """True if it has a picture or a video."""
        return bool(self.images) or self.shows_video

    @property
    def shows_video(self) -> bool:
        return bool(self.video_path) or self.video is not None or self.video_frames is not None

    @property
    def pictures_at_once(self) -> int:
        """The number of pictures in one question, before they are read: a tensor of four dimensions is a batch."""
        if self.image_mode != default("image_mode"):
            return min(1, len(self.images))
        shapes: list[Sequence[int]] = [getattr(picture, "shape", ()) for picture in self.images.values()]
        return sum(shape[0] if len(shape) == 4 else 1 for shape in shapes)


@dataclass(frozen=True, slots=True)
class LoadStats:
    """Which model answered, on which device, and how it was loaded."""

    model: str
    device: str
    dtype: str
    quantization: str
    # How attention was computed: for the prompt, and for the tokens after it.
    attention: str
    decode_attention: str
    # One sentence for each thing that was asked for and was not possible.
    fallbacks: tuple[str, ...]
    # 0 if the model was in memory already.
    load_s: float


@dataclass(frozen=True, slots=True)
class PromptStats:
    """The prompt: its tokens, the time it took, and how the model saw the pictures."""

    prompt_tokens: int
    # How many of these were still in memory from the last question about the same pictures.
    reused_tokens: int
    # From the start of the run to the first token, without loading.
    first_token_s: float
    prefill_s: float
    # The unit of the model's boxes and points: "pixels" of the picture as it was seen, "0-1000", or "" if unknown.
    coordinates: str = ""
    # (width, height) in pixels at which each picture was seen, by answer; empty if unknown.
    seen_sizes: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """What the model wrote, and how its tokens were generated."""

    # The number of answers, and the most that were generated at a time.
    answers: int
    batch_size: int
    new_tokens: int
    # For the token loop alone, all rows of a batch together: the first token belongs to the prefill.
    decode_tokens_per_s: float
    # How many thoughts the thinking budget ended.
    thoughts_cut: int
    # The way in which tokens were generated, and why not a faster one.
    tier: str
    tier_reason: str
    # The sampling that was used, and its source: the widgets or the model's makers.
    sampling: Sampling
    sampling_from: str
    # None if the seed had no effect.
    seed: int | None


@dataclass(frozen=True, slots=True)
class Stats:
    """What one run did and how long it took, measured."""

    loaded: LoadStats
    prompt: PromptStats
    decode: DecodeStats
    # On a GPU the most that this run held; elsewhere the most that the process has ever held.
    peak_bytes: int
    total_s: float
    # What diagnostics "full" measured, ready for JSON; None otherwise.
    diagnostics: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Format it as one flat JSON object, indented."""
        figures = asdict(self)
        flat = {**figures.pop("loaded"), **figures.pop("prompt"), **figures.pop("decode"), **figures}
        return json.dumps(flat, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        loaded, prompt, decode = self.loaded, self.prompt, self.decode
        own = f", {decode.sampling_from} sampling ({decode.sampling})" if decode.sampling_from == MODELS_OWN else ""
        many = f", {decode.answers} answers, {decode.batch_size} at a time" if decode.answers != 1 else ""
        return (
            f"{loaded.model}: {prompt.prompt_tokens} prompt + {decode.new_tokens} new tokens, first token after "
            f"{prompt.first_token_s:.2f} s (prefill {prompt.prefill_s:.2f} s), "
            f"{decode.decode_tokens_per_s:.1f} tokens/s, total {self.total_s:.1f} s{many}, "
            f"seed {'none (greedy)' if decode.seed is None else decode.seed}{own}"
        )


@dataclass(frozen=True, slots=True)
class Question:
    """The pictures of one question; its text and videos are the request's."""

    # Counted from 0.
    number: int
    # PIL images in RGB.
    pictures: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its text without the think block, and the think block."""

    text: str
    thinking: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to the question of that number, or the error that prevented it."""

    number: int
    result: Answer | Exception


@dataclass(frozen=True, slots=True)
class Result:
    """The answers in the order of the pictures, a single one with image_mode together, and the figures of the run."""

    answers: tuple[Answer, ...]
    stats: Stats

    @property
    def text(self) -> str:
        """The text of a single answer."""
        (answer,) = self.answers
        return answer.text

    @property
    def thinking(self) -> str:
        """The thought of a single answer."""
        (answer,) = self.answers
        return answer.thinking
