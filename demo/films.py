"""Short videos for training: one to three scenes, sampled as a video loader would sample them."""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from pixels import Grid, on_grid, pick_canvas, worn
from world import NAMES, Figure, draw, moved, pick_figure, pick_rgb


@dataclass(frozen=True, slots=True)
class Film:
    """A sampled video.

    Attributes:
        figures: the figures that are seen, in order, each once.
        frames: (T, H, W, 3) uint8, T even.
        seconds: the middle time of each pair of frames.
    """

    figures: tuple[Figure, ...]
    frames: np.ndarray
    seconds: tuple[float, ...]

    @property
    def caption(self) -> str:
        return ", then ".join(figure.name for figure in self.figures)


@dataclass(frozen=True, slots=True)
class _Scene:
    figure: Figure
    target: tuple[float, float]
    start_s: float
    length_s: float


def pick_film(rng: random.Random, grid: Grid) -> Film:
    scenes = _pick_scenes(rng)
    total = scenes[-1].start_s + scenes[-1].length_s
    times = _sample_times(rng, total)
    shown = [next(scene for scene in reversed(scenes) if scene.start_s <= time) for time in times]
    figures = tuple(scene.figure for scene in scenes if scene in shown)
    canvas = pick_canvas(rng, grid)
    frames = [_frame(rng, scene, time, canvas, grid) for scene, time in zip(shown, times, strict=True)]
    middles = tuple((a + b) / 2 for a, b in zip(times[::2], times[1::2], strict=True))
    return Film(figures, np.stack(frames), middles)


def _sample_times(rng: random.Random, total_s: float) -> list[float]:
    """Return an even number of moments, at least four, from the first to the last frame, at 0.5 to 2 a second."""
    count = max(4, math.floor(total_s * rng.choice((0.5, 1, 1, 1, 1.5, 2))))
    count += count % 2
    last_frame_s = total_s - 1 / rng.choice((4, 8, 12, 24, 30))
    return [last_frame_s * i / (count - 1) for i in range(count)]


def _pick_scenes(rng: random.Random) -> list[_Scene]:
    background = rng.choice(NAMES) if rng.random() < 0.6 else None
    in_place = rng.random() < 0.3
    scenes: list[_Scene] = []
    start = 0.0
    for _ in range(rng.choice((1, 2, 2, 2, 3, 3))):
        figure = _next_figure(rng, scenes[-1].figure if scenes else None, background, in_place)
        target = (rng.random(), rng.random()) if rng.random() < 0.5 else (figure.u, figure.v)
        length = rng.uniform(1, 4)
        scenes.append(_Scene(figure, target, start, length))
        start += length
    return scenes


def _next_figure(rng: random.Random, before: Figure | None, background: str | None, in_place: bool) -> Figure:
    """Pick a figure that differs from the one before. In place: at its place, with another colour or shape."""
    if before is None:
        return pick_figure(rng, background=background)
    while True:
        figure = pick_figure(rng, background=before.background if in_place else background)
        figure = replace(figure, sharp=before.sharp)
        if in_place:
            figure = _put_in_place(rng, figure, before)
        if figure.label != before.label and figure.color != figure.background:
            return figure


def _put_in_place(rng: random.Random, figure: Figure, before: Figure) -> Figure:
    figure = replace(figure, u=before.u, v=before.v, size=before.size, backdrop=before.backdrop)
    keep = rng.random()
    if keep < 0.4:
        return replace(figure, shape=before.shape, flipped=before.flipped, angle=before.angle)
    if keep < 0.6:
        return replace(figure, color=before.color, fill=pick_rgb(rng, before.color))
    return figure


def _frame(rng: random.Random, scene: _Scene, time_s: float, canvas: tuple[int, int], grid: Grid) -> np.ndarray:
    share = min(1.0, (time_s - scene.start_s) / scene.length_s)
    return on_grid(worn(draw(moved(scene.figure, *scene.target, share), *canvas), rng), grid)
