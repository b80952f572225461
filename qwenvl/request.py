"""What flows through the pipeline: a Request goes in, a Result comes out. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .settings import InvalidSettingError, in_ranges, one_of, shown, text_of

QUANTIZATIONS = ("none", "4bit", "8bit")
ATTENTIONS = ("sdpa", "flash_attention_2", "eager", "auto", "flash_attention_3", "flash_attention_4", "flex_attention")
SYSTEM_PROMPT = "You are a helpful assistant."
# Where a model runs, besides a device by its name in torch.
AUTO, ALL_GPUS, ALL_GPUS_AND_CPU = "auto", "all GPUs", "all GPUs and CPU"
_DEVICE = re.compile(rf"{AUTO}|{ALL_GPUS}|{ALL_GPUS_AND_CPU}|cpu|mps|(cuda|xpu):\d+")
MAX_SEED = 2**64 - 1
# Whose temperature, top_p and the like are used.
SAMPLING_FROM = AS_SET, MODELS_OWN = ("as set", "model's own")
# When a model that is kept loaded goes. Keeping none loaded means the last.
RELEASES = ("when ComfyUI needs memory", "after the prompt", "after the node")
# How much a run tells of itself.
DIAGNOSTICS = ("summary", "full", "off")
# One question about all pictures, or the same question about each of them.
IMAGE_MODES = ("together", "one answer per image")
# Whether a model thinks before it answers; auto leaves it as it is.
THINKING = ("auto", "on", "off")
# What pictures are scaled to: at least and at most so many pixels. None leaves them to what the model was loaded with.
RESOLUTIONS: dict[str, tuple[int, int] | None] = {
    "auto": None,
    "low (256x28x28)": (128 * 28 * 28, 256 * 28 * 28),
    "medium (512x28x28)": (256 * 28 * 28, 512 * 28 * 28),
    "high (768x28x28)": (512 * 28 * 28, 768 * 28 * 28),
    "ultra (1024x28x28)": (768 * 28 * 28, 1024 * 28 * 28),
    # As they are, but for the smallest that can be cut into patches.
    "original": (56 * 56, 1 << 40),
}

# Whether a model that is nowhere may be downloaded.
DOWNLOADS = ("auto", "never")

# Lowest and highest value of every sampling parameter, as the widgets and the command line offer them.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 200),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1.0, 2.0),
    "max_new_tokens": (1, 32768),
    "seed": (-1, MAX_SEED),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "no_repeat_ngram_size": (0, 100),
    "min_new_tokens": (0, 32768),
    "thinking_budget": (0, 32768),
}
# The same of what is shown of a video.
FRAME_RANGES: dict[str, tuple[float, float]] = {
    "sample_fps": (0.01, 60.0),
    "max_frames": (1, 2048),
    "max_frame_pixels": (28 * 28, 4096 * 28 * 28),
    "max_video_tokens": (256, 262144),
    "fps": (0.01, 240.0),
}


def _nearest(value: float, low: float, high: float) -> float:
    """Within the range, and whole where the range is."""
    inside = min(max(value, low), high)
    return int(inside) if isinstance(low, int) else float(inside)


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """Everything that decides which weights sit in memory: the cache key."""

    model: str
    quantization: str = "none"
    attention: str = "sdpa"
    device: str = AUTO

    def __post_init__(self) -> None:
        text_of("model", self.model)
        one_of("quantization", self.quantization, QUANTIZATIONS)
        one_of("attention_mode", self.attention, ATTENTIONS)
        if not (isinstance(self.device, str) and _DEVICE.fullmatch(self.device)):
            raise InvalidSettingError(f"device must be like auto, cpu, cuda:0 or all GPUs, got {shown(self.device)}.")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when there are enough.

    top_k 0, top_p 1, min_p 0, repetition_penalty 1, and 0 for all after the seed switch that off.
    """

    do_sample: bool = True
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    # Tokens for thinking. Where there is such a limit, max_new_tokens counts the answer alone.
    thinking_budget: int = 0
    # The answer ends before the first of these.
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        in_ranges(self, RANGES)
        if not isinstance(self.stop, tuple) or not all(isinstance(each, str) and each for each in self.stop):
            raise InvalidSettingError(f"stop must be a list of texts that are not empty, got {shown(self.stop)}.")

    def with_own(self, own: Mapping[str, Any]) -> Sampling:
        """What a model's makers recommend, in place of what is set; what they do not name stays.

        Args:
            own: values by name. Those outside our ranges become the nearest that is inside, as a top_k of -1 for off.
        """
        known = {name: value for name, value in own.items() if name in RANGES and isinstance(value, int | float)}
        # NaN is no recommendation.
        given: dict[str, Any] = {
            name: _nearest(value, *RANGES[name]) for name, value in known.items() if value == value
        }
        return replace(self, **given, do_sample=bool(own.get("do_sample", self.do_sample)))

    def __str__(self) -> str:
        if self.greedy:
            return "greedy"
        filters = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return ", ".join(f"{name} {getattr(self, name):g}" for name in filters)

    @property
    def greedy(self) -> bool:
        """True where the best token is always taken, so that the seed has no effect."""
        return not self.do_sample or self.temperature == 0

    @property
    def longest(self) -> int:
        """The most tokens of one answer, its thinking included."""
        return self.max_new_tokens + self.thinking_budget


@dataclass(frozen=True, slots=True)
class Frames:
    """What is shown of videos."""

    # Frames a second that are shown.
    sample_fps: float = 1.0
    max_frames: int = 64
    max_frame_pixels: int = 768 * 28 * 28
    # Of all videos of a question together.
    max_video_tokens: int = 8192
    # Of video_frames, which has no times of its own.
    fps: float = 24.0

    def __post_init__(self) -> None:
        in_ranges(self, FRAME_RANGES)


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
    release: str = RELEASES[0]
    diagnostics: str = DIAGNOSTICS[0]
    image_mode: str = IMAGE_MODES[0]
    image_resolution: str = "auto"
    # An IMAGE batch that is a video.
    video_frames: Any = None
    # ComfyUI's VIDEO, or whatever else has its get_stream_source().
    video: Any = None
    frames: Frames = Frames()
    thinking: str = "auto"
    download: str = DOWNLOADS[0]
    sampling_from: str = AS_SET

    def __post_init__(self) -> None:
        one_of("release", self.release, RELEASES)
        one_of("diagnostics", self.diagnostics, DIAGNOSTICS)
        one_of("image_mode", self.image_mode, IMAGE_MODES)
        one_of("image_resolution", self.image_resolution, tuple(RESOLUTIONS))
        one_of("thinking", self.thinking, THINKING)
        one_of("download", self.download, DOWNLOADS)
        one_of("sampling", self.sampling_from, SAMPLING_FROM)
        for name in ("text", "system"):
            object.__setattr__(self, name, text_of(name, getattr(self, name)))

    @property
    def shows_something(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.images or self.video_path) or self.video is not None or self.video_frames is not None


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
