"""Stage one of training: the vision tower learns to see by itself.

Small heads read shape, colours, outline and box from the tower's tokens. They are dropped afterwards. Without them the
tower needs many times longer to see anything, because the language model's loss alone holds too little information.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from pixels import Grid, Sizes, cells, on_grid, patches, pick_canvas, pick_grid, rows_for, worn
from torch import nn
from torch.nn import functional
from world import NAMES, SHAPES, Figure, box_of, coverage, draw, moved, outline, pick_figure

# The outline is taught at 8 x 8 points a cell, so 4 x 4 a patch.
_POINTS = 8
_EDGES = 3


@dataclass(frozen=True, slots=True)
class Views:
    """Pictures of one grid and what they show.

    Attributes:
        pixels: (N * patches, 1536) float32.
        grid: (N, 3) int64, in patches.
        names: (N, 3) int64: shape, colour, background.
        mask: (N, cells, 64) float32, how much of each point the shape covers.
        edges: (N, cells, 12) float32, direction of the outline in the four patches of each cell.
        boxes: (N, 4) float32 in [0, 1].
        centers: (cells, 2) float32 in [0, 1], where the middle of each cell is.
    """

    pixels: torch.Tensor
    grid: torch.Tensor
    names: torch.Tensor
    mask: torch.Tensor
    edges: torch.Tensor
    boxes: torch.Tensor
    centers: torch.Tensor


@dataclass(frozen=True, slots=True)
class _View:
    clip: np.ndarray
    names: tuple[int, int, int]
    mask: np.ndarray
    box: np.ndarray


def pick_views(rng: random.Random, rows: int, sizes: Sizes, ease: float) -> Views:
    grid = pick_grid(rng, sizes)
    count = rows_for(rows, sizes, grid, least=8)
    # Two different frames in a temporal patch, as in a video: the shape has moved a little.
    drift = rng.choice((0.02, 0.1, 0.25)) if rng.random() < 0.3 else 0.0
    views = [_pick_view(rng, grid, ease, drift) for _ in range(count)]
    mask = np.stack([view.mask for view in views])
    pixels = patches(np.stack([view.clip for view in views]))
    return Views(
        pixels=torch.from_numpy(pixels.reshape(-1, pixels.shape[-1])),
        grid=torch.tensor([[1, 2 * grid[1], 2 * grid[0]]] * count),
        names=torch.tensor([view.names for view in views]),
        mask=torch.from_numpy(cells(mask, _POINTS)),
        edges=torch.from_numpy(_edges(mask)),
        boxes=torch.from_numpy(np.stack([view.box for view in views]).astype(np.float32)),
        centers=_centers(grid),
    )


def _pick_view(rng: random.Random, grid: Grid, ease: float, drift: float) -> _View:
    figure, canvas = pick_figure(rng, ease=ease), pick_canvas(rng, grid)
    frames = [figure]
    if drift:
        u, v = (min(1.0, max(0.0, at + rng.uniform(-drift, drift))) for at in (figure.u, figure.v))
        frames.append(moved(figure, u, v))
    corners = [outline(frame, *canvas) for frame in frames]
    masks = [coverage(points, canvas, grid[0] * _POINTS, grid[1] * _POINTS) for points in corners]
    return _View(
        clip=np.stack([on_grid(worn(draw(frame, *canvas), rng), grid) for frame in frames]),
        names=_name_indices(figure),
        mask=np.mean(masks, axis=0),
        box=np.mean([box_of(points, *canvas) for points in corners], axis=0),
    )


def _centers(grid: Grid) -> torch.Tensor:
    columns, rows = ((torch.arange(side) + 0.5) / side for side in grid)
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([right.flatten(), down.flatten()], dim=1)


def _name_indices(figure: Figure) -> tuple[int, int, int]:
    return SHAPES.index(figure.shape), NAMES.index(figure.color), NAMES.index(figure.background)


def _edges(mask: np.ndarray) -> np.ndarray:
    """Return (N, cells, 12): the structure tensor of the outline, summed over each patch."""
    down, right = np.gradient(mask, axis=(1, 2))
    parts = (right * right + down * down, right * right - down * down, 2 * right * down)
    half = _POINTS // 2
    sums = [cells(part, half).sum(-1).reshape(len(mask), mask.shape[1] // half, -1) for part in parts]
    return np.concatenate([cells(part, 2) for part in sums], axis=-1).astype(np.float32)


class Heads(nn.Module):
    """Training-only readers of the vision tower's output.

    Args:
        width: size of the tower's tokens, as the language model gets them.
        glances: how many attention-pooled views the shape is read from.
    """

    def __init__(self, width: int, glances: int = 4) -> None:
        super().__init__()
        pooled = width * (glances + 1)
        self.attention = nn.Linear(width, glances)
        self.shape = nn.Sequential(nn.LayerNorm(pooled), nn.Linear(pooled, 128), nn.GELU(), nn.Linear(128, len(SHAPES)))
        self.color = nn.Linear(width, len(NAMES))
        self.background = nn.Linear(width, len(NAMES))
        self.mask = nn.Linear(width, _POINTS * _POINTS)
        self.edges = nn.Linear(width, 4 * _EDGES)
        self.shape_of_cell = nn.Linear(width, len(SHAPES))
        self.box_of_cell = nn.Linear(width, 4)
        self.center_of_cell = nn.Linear(width, 2)

    def forward(self, tower: nn.Module, views: Views, reach: bool) -> tuple[torch.Tensor, dict[str, float]]:
        """Return (loss, figures for the log). Without `reach` only the heads learn from the loss."""
        with torch.set_grad_enabled(reach):
            output = tower(views.pixels, grid_thw=views.grid)
        count = len(views.grid)
        late, early = (
            tokens.view(count, -1, tokens.shape[-1]) for tokens in (output.pooler_output, output.deepstack_features[0])
        )
        named, share_right = self._naming_loss(late, views.names)
        drawn = functional.binary_cross_entropy_with_logits(self.mask(late), views.mask)
        drawn = drawn + functional.mse_loss(self.edges(early), views.edges) / views.edges.square().mean()
        in_cells, errors = self._cell_loss(late, views)
        return named + drawn + in_cells, {"seen": share_right, **errors}

    def _naming_loss(self, tokens: torch.Tensor, names: torch.Tensor) -> tuple[torch.Tensor, float]:
        mean = tokens.mean(1)
        weights = self.attention(tokens).softmax(1)
        glances = torch.einsum("bln,bld->bnd", weights, tokens).flatten(1)
        shape = self.shape(torch.cat([glances, mean], -1))
        loss = functional.cross_entropy(shape, names[:, 0])
        loss = loss + functional.cross_entropy(self.color(mean), names[:, 1])
        loss = loss + functional.cross_entropy(self.background(mean), names[:, 2])
        return loss, (shape.argmax(-1) == names[:, 0]).float().mean().item()

    def _cell_loss(self, tokens: torch.Tensor, views: Views) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of what cells predict: their place and, where they show the shape, its name and box."""
        shown = views.mask.mean(-1) > 0.03
        shapes = views.names[:, :1].expand(shown.shape)[shown]
        boxes = views.boxes[:, None].expand(*shown.shape, 4)[shown]
        box_error = (self.box_of_cell(tokens)[shown] - boxes).abs().mean()
        astray = (self.center_of_cell(tokens) - views.centers).abs().mean()
        loss = 2 * functional.cross_entropy(self.shape_of_cell(tokens)[shown], shapes) + 5 * box_error + 5 * astray
        return loss, {"box error": box_error.item(), "astray": astray.item()}
