"""What flows through the pipeline: a Request goes in, a Result comes out. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Quantization = Literal["none", "4bit", "8bit"]
Attention = Literal["sdpa", "flash_attention_2", "eager", "auto"]

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
ATTENTIONS: tuple[str, ...] = get_args(Attention)
MAX_SEED = 2**64 - 1
# When a model that is kept loaded goes. Keeping none loaded means the last.
RELEASES = ("when ComfyUI needs memory", "after the prompt", "after the node")
# One question about all pictures, or the same question about each of them.
IMAGE_MODES = ("together", "one answer per image")

# Lowest and highest value of every sampling parameter, as the widgets and the command line offer them.
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 200),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1.0, 2.0),
    "max_new_tokens": (1, 32768),
    "seed": (-1, MAX_SEED),
}


class InvalidSettingError(ValueError):
    """A setting has a value that it cannot have."""


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """Everything that decides which weights sit in memory: the cache key."""

    model: str
    quantization: str = "none"
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        _one_of("quantization", self.quantization, QUANTIZATIONS)
        _one_of("attention_mode", self.attention, ATTENTIONS)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch that filter off."""

    do_sample: bool = True
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int = -1

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            # Written so that NaN, which compares as false, is refused too.
            if isinstance(value, str) or not low <= value <= high:
                raise InvalidSettingError(f"{name} must be between {low} and {high}, got {value!r}.")

    @property
    def greedy(self) -> bool:
        """True where the best token is always taken, so that the seed has no effect."""
        return not self.do_sample or self.temperature == 0


@dataclass(frozen=True, slots=True)
class Request:
    """One question. `images` maps the input's name, which errors repeat, to an IMAGE tensor or a picture file."""

    load: LoadSpec
    text: str
    system: str = ""
    images: Mapping[str, Any] = field(default_factory=dict)
    video_path: str = ""
    sampling: Sampling = Sampling()
    release: str = RELEASES[0]
    image_mode: str = IMAGE_MODES[0]

    def __post_init__(self) -> None:
        _one_of("release", self.release, RELEASES)
        _one_of("image_mode", self.image_mode, IMAGE_MODES)


@dataclass(frozen=True, slots=True)
class Stats:
    """What one run did and how long it took, measured."""

    model: str
    device: str
    dtype: str
    quantization: str
    attention: str
    # One sentence for each thing that was asked for and could not be had.
    fallbacks: tuple[str, ...]
    # None where the seed had no effect.
    seed: int | None
    prompt_tokens: int
    new_tokens: int
    # 0 where the model was in memory already.
    load_s: float
    # From the start of the run to the first token, loading left out.
    first_token_s: float
    prefill_s: float
    # Of the token loop alone: the first token belongs to the prefill.
    decode_tokens_per_s: float
    # Prompt tokens that were still in memory from the last question about the same pictures.
    reused_tokens: int
    # Which way tokens were made, and why not a faster one.
    tier: str
    tier_reason: str
    total_s: float

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.prompt_tokens} prompt + {self.new_tokens} new tokens, first token after "
            f"{self.first_token_s:.2f} s (prefill {self.prefill_s:.2f} s), {self.decode_tokens_per_s:.1f} tokens/s, "
            f"total {self.total_s:.1f} s, seed {'none (greedy)' if self.seed is None else self.seed}"
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer without the think block, and the think block."""

    text: str
    thinking: str = ""


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


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidSettingError(f"{name} {value!r} does not exist. Pick one of: {', '.join(allowed)}.")
