"""Pictures and videos for the evaluation, drawn by other code than those for training.

They look as a test of a vision model would draw them with Pillow: CSS colours, primitives, no wear. Shape, colour and
background are always a combination that training never used.
"""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from world import pick_combination, with_article

Box = tuple[float, float, float, float]

# Width and height in pixels, from smaller than a token's worth to larger than the processor keeps.
SIZES = (
    (48, 48),
    (64, 64),
    (100, 75),
    (96, 160),
    (128, 128),
    (300, 100),
    (256, 256),
    (320, 240),
    (240, 400),
    (512, 512),
    (640, 360),
    (480, 640),
    (1024, 576),
    (1024, 1024),
)
FRAME_SIZES = ((64, 64), (96, 96), (128, 96), (160, 120), (240, 320), (320, 240))
_VIDEO_FPS = 8


@dataclass(frozen=True, slots=True)
class Sight:
    """One shape on a background. size: diameter as a share of the shorter side; u, v: place, from 0 to 1."""

    shape: str
    color: str
    background: str
    size: float = 0.6
    u: float = 0.5
    v: float = 0.5

    @property
    def label(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def caption(self) -> str:
        return f"{with_article(self.label)} on {with_article(self.background)} background"


def pick_sight(rng: random.Random) -> Sight:
    return Sight(*pick_combination(rng, held_out=True), rng.uniform(0.45, 0.85), rng.random(), rng.random())


def _place(sight: Sight, width: int, height: int) -> tuple[float, float, float]:
    """Return (centre x, centre y, radius) in pixels."""
    radius = sight.size * min(width, height) / 2
    return radius + sight.u * (width - 2 * radius), radius + sight.v * (height - 2 * radius), radius


def _polygons(shape: str) -> list[list[tuple[float, float]]]:
    """Return the corners, in [-1, 1], of the polygons of a shape; the circle is drawn as an ellipse."""
    if shape == "star":
        turn = [(1 if i % 2 == 0 else 0.4, i * math.pi / 5) for i in range(10)]
        return [[(reach * math.sin(angle), -reach * math.cos(angle)) for reach, angle in turn]]
    bar = 0.3
    return {
        "square": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
        "triangle": [[(0, -1), (1, 0.8), (-1, 0.8)]],
        "diamond": [[(0, -1), (0.9, 0), (0, 1), (-0.9, 0)]],
        "cross": [
            [(-bar, -1), (bar, -1), (bar, 1), (-bar, 1)],
            [(-1, -bar), (1, -bar), (1, bar), (-1, bar)],
        ],
    }[shape]


def draw_sight(sight: Sight, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), ImageColor.getrgb(sight.background))
    brush, fill = ImageDraw.Draw(image), ImageColor.getrgb(sight.color)
    x, y, radius = _place(sight, width, height)
    if sight.shape == "circle":
        brush.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
        return image
    for corners in _polygons(sight.shape):
        brush.polygon([(x + radius * right, y + radius * down) for right, down in corners], fill=fill)
    return image


def true_box(image: Image.Image) -> Box:
    """Return (left, top, right, bottom) of all that differs from the corner pixel, from 0 to 1000 of each side."""
    pixels = np.asarray(image).astype(int)
    rows, columns = np.nonzero(np.abs(pixels - pixels[0, 0]).sum(-1))
    width, height = image.size
    # Plain numbers, because numpy's cannot be written as JSON.
    left, top, right, bottom = (int(edge) for edge in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return 1000 * left / width, 1000 * top / height, 1000 * right / width, 1000 * bottom / height


def overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, wide) * max(0.0, high)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Clip:
    """A sampled video: (T, H, W, 3) uint8 frames, their indices in the video, and the answer."""

    frames: np.ndarray
    indices: tuple[int, ...]
    answer: str

    @property
    def metadata(self) -> dict[str, object]:
        return {"fps": _VIDEO_FPS, "frames_indices": list(self.indices), "total_num_frames": self.indices[-1] + 1}


def pick_clip(rng: random.Random, scenes: int, per_second: float, shortest_s: int = 1) -> Clip:
    """Make a video of scenes of shortest_s to 4 s, every one of them in at least one sampled frame."""
    sights = _pick_scenes(rng, scenes)
    while True:
        lengths = [rng.randint(shortest_s * _VIDEO_FPS, 4 * _VIDEO_FPS) for _ in sights]
        shown = [number for number, length in enumerate(lengths) for _ in range(length)]
        indices = _sampled(len(shown), per_second)
        if len({shown[index] for index in indices}) == scenes:
            break
    size = rng.choice(FRAME_SIZES)
    speeds = [rng.choice((0.0, 0.3)) / length for length in lengths]
    frames = [draw_sight(_drifted(sights[shown[index]], speeds[shown[index]] * index), *size) for index in indices]
    answer = ", then ".join(with_article(sight.label) for sight in sights)
    return Clip(np.stack([np.asarray(frame) for frame in frames]), indices, answer)


def _drifted(sight: Sight, way: float) -> Sight:
    return replace(sight, u=min(1.0, sight.u + way))


def _pick_scenes(rng: random.Random, scenes: int) -> list[Sight]:
    sights = [pick_sight(rng)]
    while len(sights) < scenes:
        sight = pick_sight(rng)
        if sight.label != sights[-1].label:
            sights.append(sight)
    return sights


def _sampled(total: int, per_second: float) -> tuple[int, ...]:
    """Return an even number of indices, at least four, from the first to the last frame."""
    count = max(4, 2 * round(total / _VIDEO_FPS * per_second / 2))
    return tuple(round(index) for index in np.linspace(0, total - 1, count).tolist())
