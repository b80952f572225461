"""The world that the demo model knows: one flat shape on one flat background.

Geometry is in fractions of the canvas, so a figure can be drawn at any size, move in a video, and has a known box.
"""

import colorsys
import math
import random
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")


@dataclass(frozen=True, slots=True)
class Hues:
    """A range of colours that people call by one name. Hue in degrees, saturation and value in [0, 1]."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


# name -> (ranges to draw from, RGB values that programs use for the name: CSS and the obvious ones)
COLORS: dict[str, tuple[tuple[Hues, ...], tuple[RGB, ...]]] = {
    "red": ((Hues((-8, 8), (0.82, 1), (0.8, 1)),), ((255, 0, 0), (220, 20, 20), (230, 30, 40), (204, 0, 0))),
    "orange": ((Hues((24, 38), (0.85, 1), (0.88, 1)),), ((255, 165, 0), (255, 140, 0), (255, 128, 0))),
    "yellow": ((Hues((51, 62), (0.75, 1), (0.88, 1)),), ((255, 255, 0), (255, 215, 0), (240, 230, 20))),
    "green": (
        (Hues((95, 148), (0.6, 1), (0.45, 1)),),
        ((0, 255, 0), (0, 128, 0), (34, 139, 34), (50, 205, 50), (0, 200, 0)),
    ),
    "cyan": ((Hues((174, 190), (0.7, 1), (0.8, 1)),), ((0, 255, 255), (64, 224, 208), (0, 206, 209))),
    "blue": (
        (Hues((208, 243), (0.7, 1), (0.5, 1)),),
        ((0, 0, 255), (0, 0, 200), (30, 144, 255), (65, 105, 225), (0, 0, 139)),
    ),
    "purple": (
        (Hues((264, 284), (0.65, 1), (0.45, 0.95)), Hues((284, 303), (0.7, 1), (0.4, 0.72))),
        ((128, 0, 128), (148, 0, 211), (160, 32, 240), (75, 0, 130), (138, 43, 226)),
    ),
    "pink": (
        (Hues((320, 351), (0.22, 0.6), (0.95, 1)),),
        ((255, 192, 203), (255, 105, 180), (255, 182, 193)),
    ),
    "brown": (
        (Hues((18, 30), (0.6, 0.9), (0.32, 0.56)),),
        ((139, 69, 19), (165, 42, 42), (101, 67, 33), (120, 72, 0)),
    ),
    "black": ((Hues((0, 360), (0, 0.3), (0, 0.08)),), ((0, 0, 0), (10, 10, 10))),
    "gray": (
        (Hues((0, 360), (0, 0.05), (0.38, 0.68)),),
        ((128, 128, 128), (105, 105, 105), (150, 150, 150), (169, 169, 169)),
    ),
    "white": ((Hues((0, 360), (0, 0.04), (0.95, 1)),), ((255, 255, 255), (250, 250, 250))),
}
NAMES = tuple(COLORS)


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def is_held_out(shape: str, color: str, background: str) -> bool:
    """Tell if training never uses this combination: about one in ten, chosen by a hash."""
    return zlib.crc32(f"{shape}/{color}/{background}".encode()) % 10 == 0


def pick_rgb(rng: random.Random, name: str) -> RGB:
    ranges, usual = COLORS[name]
    if rng.random() < 0.45:
        shake = rng.choice((0, 0, 5))
        return tuple(min(255, max(0, channel + rng.randint(-shake, shake))) for channel in rng.choice(usual))
    hues = rng.choice(ranges)
    hue = rng.uniform(*hues.hue) % 360 / 360
    channels = colorsys.hsv_to_rgb(hue, rng.uniform(*hues.saturation), rng.uniform(*hues.value))
    return tuple(round(255 * channel) for channel in channels)


def _unit_outlines() -> dict[str, np.ndarray]:
    """Return the outlines of all shapes, in [-1, 1], y down."""
    turn = np.arange(64) * math.tau / 64
    spikes = np.arange(10) * math.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1, 0.42)
    a = 0.33
    half_cross = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
    return {
        "circle": np.stack([np.cos(turn), np.sin(turn)], 1),
        "square": np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]),
        "triangle": np.array([(0, -1), (0.98, 0.82), (-0.98, 0.82)]),
        "star": np.stack([reach * np.sin(spikes), -reach * np.cos(spikes)], 1),
        "diamond": np.array([(0, -1), (0.86, 0), (0, 1), (-0.86, 0)]),
        "cross": np.array(half_cross + [(-x, -y) for x, y in half_cross]),
    }


_OUTLINES = _unit_outlines()


@dataclass(frozen=True, slots=True)
class Figure:
    """A shape on a background.

    Attributes:
        size: diameter as a share of the shorter side of the canvas.
        u, v: where the shape is in the room it has, 0 (left, top) to 1 (right, bottom).
        angle: rotation in degrees.
        aspect: width over height of the shape.
        sharp: drawn without anti-aliasing.
    """

    shape: str
    color: str
    background: str
    fill: RGB
    backdrop: RGB
    size: float = 0.6
    u: float = 0.5
    v: float = 0.5
    angle: float = 0.0
    aspect: float = 1.0
    flipped: bool = False
    sharp: bool = False

    @property
    def label(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def name(self) -> str:
        return with_article(self.label)

    @property
    def caption(self) -> str:
        return f"{self.name} on {with_article(self.background)} background"


def pick_combination(
    rng: random.Random, held_out: bool | None = False, background: str | None = None
) -> tuple[str, str, str]:
    """Pick (shape, colour, background) of the training part, the held-out part, or (None) either."""
    while True:
        shape, color = rng.choice(SHAPES), rng.choice(NAMES)
        behind = background or rng.choice(NAMES)
        if color != behind and held_out in (None, is_held_out(shape, color, behind)):
            return shape, color, behind


def pick_figure(
    rng: random.Random, held_out: bool | None = False, ease: float = 0.0, background: str | None = None
) -> Figure:
    """Pick a random figure. ease 1 gives only large, centred, upright shapes, 0 all of them."""
    shape, color, behind = pick_combination(rng, held_out, background)
    room = 1 - ease
    return Figure(
        shape,
        color,
        behind,
        fill=pick_rgb(rng, color),
        backdrop=pick_rgb(rng, behind),
        size=rng.uniform(0.36 + 0.29 * ease, 0.9),
        u=0.5 + room * (rng.random() - 0.5),
        v=0.5 + room * (rng.random() - 0.5),
        angle=room * rng.uniform(-12, 12) if rng.random() < 0.5 else 0.0,
        aspect=math.exp(rng.uniform(-0.12, 0.12)),
        flipped=shape == "triangle" and rng.random() < 0.15,
        sharp=rng.random() < 0.25,
    )


def moved(figure: Figure, u: float, v: float, share: float = 1.0) -> Figure:
    """Return the figure after `share` of the way to (u, v)."""
    return replace(figure, u=figure.u + (u - figure.u) * share, v=figure.v + (v - figure.v) * share)


def outline(figure: Figure, width: int, height: int) -> np.ndarray:
    """Return the corners (K, 2) in pixels, on a canvas of width x height."""
    short = min(width, height)
    radius = min(max(figure.size * short, 22), 0.95 * short) / 2
    points = _OUTLINES[figure.shape] * (min(1.0, figure.aspect), min(1.0, 1 / figure.aspect))
    if figure.flipped:
        points = points * (1, -1)
    cos, sin = math.cos(math.radians(figure.angle)), math.sin(math.radians(figure.angle))
    points = points @ np.array([[cos, sin], [-sin, cos]])
    margin = 1.02 * radius
    center = [margin + at * max(side - 2 * margin, 0) for at, side in ((figure.u, width), (figure.v, height))]
    return points * radius + center


def box_of(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return (left, top, right, bottom) as shares of the canvas, in [0, 1]."""
    corners = np.concatenate([points.min(0), points.max(0)]) / (width, height, width, height)
    return corners.clip(0, 1)


def draw(figure: Figure, width: int, height: int) -> Image.Image:
    finer = 1 if figure.sharp else 2
    image = Image.new("RGB", (width * finer, height * finer), figure.backdrop)
    corners = outline(figure, width, height) * finer
    ImageDraw.Draw(image).polygon([tuple(point) for point in corners.tolist()], fill=figure.fill)
    return image.reduce(finer) if finer > 1 else image


def coverage(points: np.ndarray, canvas: tuple[int, int], columns: int, rows: int) -> np.ndarray:
    """Return (rows, columns) float32, 1 inside the shape, at a coarser resolution than the canvas."""
    scaled = points * (columns / canvas[0], rows / canvas[1])
    mask = Image.new("L", (columns, rows), 0)
    ImageDraw.Draw(mask).polygon([tuple(point) for point in scaled.tolist()], fill=1)
    return np.asarray(mask, dtype=np.float32)
