"""Runs of changing kinds, drawn from a seed, and the result each must have. For soak.py and test_endurance.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from qwenvl.loading.cache import ModelCache
from qwenvl.media.media import MediaError
from qwenvl.models.catalog import DEMO
from qwenvl.pipeline import run
from qwenvl.prompting.answer import NoAnswerError
from qwenvl.prompting.prompt import PromptError
from qwenvl.request import LoadSpec, Request, Sampling
from qwenvl.settings import DIAGNOSTICS, IMAGE_MODES, RELEASES, RESOLUTIONS

# Colours and sizes that the demo model always names rightly.
COLORS = ("red", "green", "yellow", "blue", "purple", "pink")
BACKGROUNDS = ("white", "black")
SIZES = ((192, 192), (128, 160))
SYSTEM = "You are a helpful assistant."
GREEDY = Sampling(do_sample=False, max_new_tokens=80)
# The ways in which a run may end.
RIGHT, UNCHECKED, CANCELLED, REFUSED = "right answer", "answer of no known text", "cancelled", "refused"


class Cancel(BaseException):
    """Stands for the user's click."""


class Watch:
    """Cancels after `cancel_at` updates, of tokens or finished answers; never if that is None."""

    def __init__(self, cancel_at: int | None = None) -> None:
        self._cancel_at = cancel_at
        self._updates = 0
        self.texts: list[str] = []

    def check(self) -> None:
        if self._cancel_at == 0:
            raise Cancel

    def stage(self, state: str, **facts: object) -> None: ...

    def report(self, done: int, total: int, text: str, state: str = "downloading") -> None: ...

    def update(self, new_tokens: int, text: str, thinking: str = "") -> None:
        self.texts.append(text)
        self._updates += 1
        if self._updates == self._cancel_at:
            raise Cancel

    def advance(self, done: int, total: int | None, text: str) -> None:
        self.update(done, text)

    def end(self, text: str) -> None:
        self.texts.append(text)


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, and the demo model's caption of it."""

    color: str
    background: str
    size: tuple[int, int] = SIZES[0]

    @property
    def caption(self) -> str:
        return f"a {self.color} circle on a {self.background} background"

    @property
    def picture(self) -> Image.Image:
        picture = Image.new("RGB", self.size, self.background)
        x, y, r = self.size[0] / 2, self.size[1] / 2, 0.32 * min(self.size)
        ImageDraw.Draw(picture).ellipse([x - r, y - r, x + r, y + r], fill=self.color)
        return picture

    @property
    def image(self) -> torch.Tensor:
        """Return the picture as ComfyUI's IMAGE."""
        return torch.from_numpy(np.asarray(self.picture, dtype=np.float32) / 255)[None]


@dataclass(frozen=True, slots=True)
class Run:
    """One run, and how it must end."""

    request: Request
    # None if any answer will do.
    answers: tuple[str, ...] | None
    # Cancel after this many tokens; 0 is before the first layer of the prompt.
    cancel_at: int | None = None
    refused: bool = False


class Mix:
    """Draws one run after the other.

    Args:
        draw: source of the random numbers.
        video: a file that write_video made.
    """

    def __init__(self, draw: random.Random, video: Path) -> None:
        self._draw = draw
        self._video = video
        self._load = LoadSpec(DEMO)

    def next(self) -> Run:
        draw = self._draw
        if draw.random() < 0.25:
            quantization = draw.choices(["none", "4bit", "8bit"], [6, 1, 1])[0]
            self._load = LoadSpec(DEMO, quantization, draw.choice(["sdpa", "eager", "auto"]))
        kind = draw.choice([self._one, self._one, self._many, self._each, self._film, self._text])
        run = self._varied(kind())
        ends = draw.choices(["by itself", "cancelled", "refused"], [8, 1, 1])[0]
        if ends == "refused":
            return self._broken(run)
        return replace(run, cancel_at=draw.randint(0, 6)) if ends == "cancelled" else run

    def scene(self) -> Scene:
        draw = self._draw
        return Scene(draw.choice(COLORS), draw.choice(BACKGROUNDS), draw.choice(SIZES))

    def _one(self) -> Run:
        scene = self.scene()
        return self._about("Describe this image.", [scene.caption], images={"image1": scene.image})

    def _many(self) -> Run:
        scenes = [self.scene() for _ in range(self._draw.randint(2, 3))]
        answer = "; ".join(f"image {number}: {scene.caption}" for number, scene in enumerate(scenes, 1))
        return self._about("Describe each image.", [f"I{answer[1:]}"], images=_connected(scenes))

    def _each(self) -> Run:
        scenes = [self.scene() for _ in range(self._draw.randint(2, 5))]
        about = {"images": _connected(scenes), "image_mode": IMAGE_MODES[1]}
        return self._about("Describe this image.", [scene.caption for scene in scenes], **about)

    def _film(self) -> Run:
        return self._about("Describe this video.", ["a red circle, then a blue square"], video_path=str(self._video))

    def _text(self) -> Run:
        return self._about("Count from 3 to 5.", ["3, 4, 5"])

    def _about(self, text: str, answers: Sequence[str], **about: Any) -> Run:
        return Run(Request(self._load, text, SYSTEM, sampling=GREEDY, **about), tuple(answers))

    def _varied(self, run: Run) -> Run:
        """Change settings of a run. If they may change the answer, the answer is no longer checked."""
        draw, request = self._draw, run.request
        request = replace(
            request,
            release=draw.choices(RELEASES, [8, 1, 1])[0],
            diagnostics=draw.choices(DIAGNOSTICS, [6, 1, 1])[0],
            thinking=draw.choices(["auto", "on"], [6, 1])[0],
        )
        if request.thinking == "on":
            request = replace(request, sampling=replace(GREEDY, thinking_budget=draw.choice([0, 4, 40])))
        if draw.random() < 0.3:
            request = replace(request, sampling=self._sampling())
        if draw.random() < 0.1:
            request = replace(request, image_resolution=draw.choice(list(RESOLUTIONS)[1:3]))
        plain = (GREEDY, "auto", "auto", "none")
        known = (request.sampling, request.thinking, request.image_resolution, request.load.quantization) == plain
        return Run(request, run.answers if known else None)

    def _sampling(self) -> Sampling:
        draw = self._draw
        return Sampling(
            temperature=draw.choice([0.5, 1.0, 1.5]),
            top_p=draw.choice([0.5, 0.9, 1.0]),
            top_k=draw.choice([0, 5, 50]),
            min_p=draw.choice([0.0, 0.05]),
            repetition_penalty=draw.choice([1.0, 1.1]),
            frequency_penalty=draw.choice([0.0, 0.5]),
            no_repeat_ngram_size=draw.choice([0, 0, 4]),
            max_new_tokens=draw.randint(8, 60),
            seed=draw.randint(-1, 99),
            stop=draw.choice([(), ("square", "\n")]),
        )

    def _broken(self, run: Run) -> Run:
        """Change a run so that it must be refused, before or after the model is loaded."""
        broken = self._draw.choice(
            [
                {"images": {"image4": torch.zeros(0, 8, 8, 3)}},
                {"images": {"image1": torch.full((1, 8, 8, 3), float("nan"))}},
                {"images": {"image1": torch.zeros(1, 8, 4000, 3)}},
                {"video_path": str(self._video.with_name("gone.mp4"))},
                {"video_path": __file__},
                {"images": {}, "video_path": "", "text": " ", "system": ""},
                {"thinking": "on", "sampling": replace(GREEDY, max_new_tokens=3)},
            ]
        )
        return Run(replace(run.request, **broken), None, refused=True)


def how_it_ended(planned: Run, models: ModelCache) -> str:
    """Do the run; return one of the four ways in which a run may end, or a sentence on what went wrong."""
    try:
        result = run(planned.request, models, Watch(planned.cancel_at))
    except Cancel:
        return CANCELLED
    except (MediaError, PromptError, NoAnswerError) as error:
        # In a run that was not broken, a thought may use up the random number of tokens.
        drawn = isinstance(error, NoAnswerError) and planned.answers is None
        return REFUSED if planned.refused or drawn else f"{type(error).__name__}: {error}"
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    texts = tuple(answer.text for answer in result.answers)
    if planned.refused:
        return f"{texts} where it should have been refused"
    if planned.answers is None:
        return UNCHECKED
    return RIGHT if texts == planned.answers else f"{texts} where it should have been {planned.answers}"


def write_video(path: Path) -> Path:
    """Write a video of a red circle, then a blue square, three seconds each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuv420p"
        for shape, color in (("ellipse", "red"), ("rectangle", "blue")):
            picture = Image.new("RGB", (128, 128), "white")
            getattr(ImageDraw.Draw(picture), shape)((24, 24, 104, 104), fill=color)
            for _ in range(24):
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def _connected(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    return {f"image{number}": scene.image for number, scene in enumerate(scenes, 1)}
