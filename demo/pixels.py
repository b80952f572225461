"""Converts pictures as Qwen3-VL's image processor does, for whole batches at once.

A "cell" is 32 x 32 pixels: 2 x 2 patches of 16, merged into one token of the language model. A "grid" is a size in
cells, (columns, rows).
"""

import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

PATCH = 16
MERGE = 2
CELL = PATCH * MERGE

Grid = tuple[int, int]

# What the demo model's processor keeps of a picture: 256 x 256 pixels' worth.
_MOST_CELLS = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """The grids to choose from: about mean_cells cells, at most `longest` to a side."""

    mean_cells: int
    longest: int = 8


@lru_cache
def _grids(longest: int) -> tuple[Grid, ...]:
    """List all grids but the thin ones."""
    sides = range(2, longest + 1)
    fits = [(w, h) for w in sides for h in sides if max(w, h) <= 3 * min(w, h)]
    return tuple((w, h) for w, h in fits if w * h <= _MOST_CELLS)


def pick_grid(rng: random.Random, sizes: Sizes) -> Grid:
    """Pick a grid. Small grids come more often, since they cost less."""
    while True:
        columns, rows = rng.choice(_grids(sizes.longest))
        if rng.random() < math.exp(min(0.0, -(columns * rows - 6) / sizes.mean_cells)):
            return columns, rows


def rows_for(rows: int, sizes: Sizes, grid: Grid, least: int) -> int:
    """Return how many pictures of this grid have about as many cells as `rows` pictures of the mean size."""
    return max(least, min(4 * rows, round(rows * sizes.mean_cells / (grid[0] * grid[1]))))


def pick_canvas(rng: random.Random, grid: Grid) -> tuple[int, int]:
    """Pick a picture size in pixels that the processor would resize to the grid, so the data has its distortion."""
    if rng.random() < 0.35:
        return grid[0] * CELL, grid[1] * CELL
    return tuple(rng.randint(side * CELL - 15, side * CELL + 15) for side in grid)


def on_grid(image: Image.Image, grid: Grid) -> np.ndarray:
    """Resize a picture to whole cells as the processor does; return (H, W, 3) uint8."""
    size = (grid[0] * CELL, grid[1] * CELL)
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    """Encode as JPEG and decode, for the coarser colour of photos and video files."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def worn(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return the picture as it is, or sometimes blurred, compressed or noisy."""
    fate = rng.random()
    if fate < 0.07:
        return image.filter(ImageFilter.GaussianBlur(0.8))
    if fate < 0.15:
        return _compressed(image, rng.randint(60, 95))
    if fate < 0.25:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 8), (*image.size[::-1], 3))
        return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


def patches(clips: np.ndarray) -> np.ndarray:
    """Cut clips into normalised patches, in the order of Qwen's processors.

    Args:
        clips: (N, T, H, W, 3) uint8, T even, or 1 for pictures (each is then doubled). H and W in whole cells.

    Returns:
        (N, T/2 * H/16 * W/16, 1536) float32 in [-1, 1].
    """
    x = np.asarray(clips, dtype=np.float32) / 127.5 - 1.0
    if x.shape[1] == 1:
        x = np.repeat(x, 2, axis=1)
    n, t, h, w, c = x.shape
    x = x.reshape(n, t // 2, 2, h // CELL, MERGE, PATCH, w // CELL, MERGE, PATCH, c)
    x = x.transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return np.ascontiguousarray(x).reshape(n, -1, c * 2 * PATCH * PATCH)


def cells(fine: np.ndarray, per_cell: int) -> np.ndarray:
    """Group values by cell: (N, rows * k, columns * k) -> (N, rows * columns, k * k)."""
    n, height, width = fine.shape
    x = fine.reshape(n, height // per_cell, per_cell, width // per_cell, per_cell)
    return x.transpose(0, 1, 3, 2, 4).reshape(n, -1, per_cell * per_cell)
