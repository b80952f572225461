"""What flows through the pipeline: a Request goes in, a Result comes out. Standard library only."""

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
        """Of values by the settings' names; those that are not there have their defaults."""
        return cls(**values_of(cls, values))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when there are enough. settings.py says which value switches what off."""

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
    # Tokens for thinking. Where there is such a limit, max_new_tokens counts the answer alone.
    thinking_budget: int = default("thinking_budget")
    # The answer ends before the first of these.
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if not isinstance(self.stop, tuple) or not all(isinstance(each, str) and each for each in self.stop):
            raise InvalidSettingError(f"stop must be a list of texts that are not empty, got {shown(self.stop)}.")

    def with_own(self, own: Mapping[str, Any]) -> Sampling:
        """What a model's makers recommend, in place of what is set; what they do not name stays.

        Args:
            own: values by name. Those outside our ranges become the nearest that is inside, as a top_k of -1 for off.
        """
        known = [(each, own[each.name]) for each in _NUMBERS if isinstance(own.get(each.name), int | float)]
        # NaN is no recommendation.
        given: dict[str, Any] = {each.name: each.nearest(value) for each, value in known if value == value}
        return replace(self, **given, do_sample=bool(own.get("do_sample", self.do_sample)))

    def __str__(self) -> str:
        if self.greedy:
            return "greedy"
        return ", ".join(f"{each.name} {getattr(self, each.name):g}" for each in _NUMBERS if each.makers)

    @property
    def greedy(self) -> bool:
        """True where the best token is always taken, so that the seed has no effect."""
        return not self.do_sample or self.temperature == 0

    @property
    def longest(self) -> int:
        """The most tokens of one answer, its thinking included."""
        return self.max_new_tokens + self.thinking_budget


_NUMBERS = [each for each in settings_of(Sampling) if each.span]


@dataclass(frozen=True, slots=True)
class Frames:
    """What is shown of videos."""

    # Frames a second that are shown.
    sample_fps: float = default("sample_fps")
    max_frames: int = default("max_frames")
    max_frame_pixels: int = default("max_frame_pixels")
    # Of all videos of a question together.
    max_video_tokens: int = default("max_video_tokens")
    # Of video_frames, which has no times of its own.
    fps: float = default("fps")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Request:
    """One question. `images` maps the input's name, which errors repeat, to an IMAGE tensor or a picture file.

    A model is shown the images, then video_frames, then video, then the file at video_path.
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
    # ComfyUI's VIDEO, or whatever else has its get_stream_source().
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
        """Of values by the settings' names; those that are not there have their defaults, and other names no effect."""
        return cls(
            load=LoadSpec.of(values),
            images=images,
            sampling=Sampling(**values_of(Sampling, values)),
            frames=Frames(**values_of(Frames, values)),
            **values_of(cls, values),
        )

    @property
    def shows_something(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.images) or self.shows_video

    @property
    def shows_video(self) -> bool:
        return bool(self.video_path) or self.video is not None or self.video_frames is not None

    @property
    def pictures_at_once(self) -> int:
        """How many pictures a question is about, before they are read: a tensor of four sizes is a batch."""
        if self.image_mode != default("image_mode"):
            return min(1, len(self.images))
        shapes: list[Sequence[int]] = [getattr(each, "shape", ()) for each in self.images.values()]
        return sum(shape[0] if len(shape) == 4 else 1 for shape in shapes)


@dataclass(frozen=True, slots=True)
class LoadStats:
    """Which model answered, where, and what it was loaded as."""

    model: str
    device: str
    dtype: str
    quantization: str
    # Of the prompt, and of the tokens after it.
    attention: str
    decode_attention: str
    # One sentence for each thing that was asked for and could not be had.
    fallbacks: tuple[str, ...]
    # 0 where the model was in memory already.
    load_s: float


@dataclass(frozen=True, slots=True)
class PromptStats:
    """What the model read."""

    prompt_tokens: int
    # Of these, how many were still in memory from the last question about the same pictures.
    reused_tokens: int
    # From the start of the run to the first token, loading left out.
    first_token_s: float
    prefill_s: float
    # What the model's boxes and points count: "pixels" of a picture as it was seen, "0-1000"; "" where not known.
    coordinates: str = ""
    # (width, height) at which each picture was seen, by answer; empty where nobody knows.
    seen_sizes: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """What the model wrote, and how its tokens were made."""

    # How many answers there are, and the most that were made at a time.
    answers: int
    batch_size: int
    new_tokens: int
    # Of the token loop alone, all rows of a batch together: the first token belongs to the prefill.
    decode_tokens_per_s: float
    # Thoughts that the thinking budget ended.
    thoughts_cut: int
    # Which way tokens were made, and why not a faster one.
    tier: str
    tier_reason: str
    # What the tokens were chosen by, and whether the widgets or the model's makers set it.
    sampling: Sampling
    sampling_from: str
    # None where the seed had no effect.
    seed: int | None


@dataclass(frozen=True, slots=True)
class Stats:
    """What one run did and how long it took, measured."""

    loaded: LoadStats
    prompt: PromptStats
    decode: DecodeStats
    # On a GPU the most that this run held; elsewhere the most that the process ever did.
    peak_bytes: int
    total_s: float
    # What diagnostics "full" measured, ready for JSON; None otherwise.
    diagnostics: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """One flat object, indented for people."""
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
    """What is asked about, beside the request's own text and videos."""

    # From 0.
    number: int
    # PIL images in RGB.
    pictures: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer without the think block, and the think block."""

    text: str
    thinking: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the question of that number: an answer, or the error that says why there is none."""

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
