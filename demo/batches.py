"""Micro-batches for training: encoded conversations with their pictures, padded to one length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from conversations import Author, Conversation
from markup import IMAGE_PAD, TEXT_END, TURN_END, VIDEO_PAD
from pixels import Grid, Sizes, patches, pick_grid, rows_for
from tokenizers import Tokenizer
from words import Writer

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Share:
    """How much of one kind of conversation a training step has.

    Attributes:
        kind: the name of a method of Author.
        rows: rows of a micro-batch, if pictures have the mean size.
        sizes: the sizes of the pictures.
    """

    kind: str
    rows: int
    sizes: Sizes


@dataclass(frozen=True, slots=True)
class Batch:
    """Model inputs of one micro-batch.

    Attributes:
        ids: (B, L) int64.
        labels: (B, L) int64, IGNORED everywhere but on answers.
        positions: (3, B, L) int64, M-RoPE.
        pictures: pixel_values, image_grid_thw and so on, as the model's forward names them.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    pictures: dict[str, torch.Tensor]


def rope_positions(ids: np.ndarray, is_vision: np.ndarray, grids: Sequence[Grid]) -> np.ndarray:
    """Compute the M-RoPE positions of one sequence, as Qwen3VLModel.get_rope_index does.

    Args:
        ids: (L,) token ids.
        is_vision: (L,) bool, where picture tokens are.
        grids: the grid of every run of picture tokens, in order.

    Returns:
        (3, L) int64: time, height and width.
    """
    positions = np.zeros((3, len(ids)), dtype=np.int64)
    at = position = 0
    for columns, rows in grids:
        start = at + int(np.argmax(is_vision[at:]))
        positions[:, at:start] = position + np.arange(start - at)
        position += start - at
        at = start + columns * rows
        down, right = np.divmod(np.arange(columns * rows), columns)
        positions[:, start:at] = position
        positions[1, start:at] += down
        positions[2, start:at] += right
        position += max(columns, rows)
    positions[:, at:] = position + np.arange(len(ids) - at)
    return positions


def runs(row: Conversation) -> list[Grid]:
    """Return the grid of each run of picture tokens in a row. A video has one run for every pair of frames."""
    pairs = 0 if row.video is None else len(row.video) // 2
    return [*row.grids, *[row.video_grid] * pairs]


def _stacked(clips: Sequence[np.ndarray], grids: Sequence[Grid]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the patches of all clips, one after another, and the clips' (N, 3) grids in patches)."""
    pixels = np.concatenate([patches(clip[None])[0] for clip in clips])
    sizes = [((len(clip) + 1) // 2, 2 * rows, 2 * columns) for clip, (columns, rows) in zip(clips, grids, strict=True)]
    return torch.from_numpy(pixels), torch.tensor(sizes)


def _pictures(rows: Sequence[Conversation]) -> dict[str, torch.Tensor]:
    found = {}
    images = [image[None] for row in rows for image in row.images]
    if images:
        pixels, grid = _stacked(images, [grid for row in rows for grid in row.grids])
        found.update(pixel_values=pixels, image_grid_thw=grid)
    filmed = [row for row in rows if row.video is not None]
    if filmed:
        pixels, grid = _stacked([row.video for row in filmed], [row.video_grid for row in filmed])
        found.update(pixel_values_videos=pixels, video_grid_thw=grid)
    return found


@dataclass(slots=True)
class Encoded:
    row: Conversation
    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Press:
    """Makes micro-batches from a random stream."""

    # The rows of this many micro-batches are made together and sorted by length, for less padding.
    AHEAD = 4

    def __init__(self, model_folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
        self._vision = [self._tokenizer.token_to_id(token) for token in (IMAGE_PAD, VIDEO_PAD)]
        self._pad = self._tokenizer.token_to_id(TEXT_END)
        self._pieces = sorted(token for token in self._tokenizer.get_vocab() if token.isascii() and token.isalpha())
        self._stock: dict[Share, list[Batch]] = {}

    def batch(self, rng: random.Random, share: Share) -> Batch:
        stock = self._stock.setdefault(share, [])
        if not stock:
            stock.extend(self._several(rng, share))
        return stock.pop()

    def _several(self, rng: random.Random, share: Share) -> list[Batch]:
        grid = pick_grid(rng, share.sizes)
        author = Author(rng, Writer(rng, self._pieces, brief=rng.random() < 0.6), grid, share.sizes)
        size = share.rows if share.kind == "text" else rows_for(share.rows, share.sizes, grid, least=4)
        rows = [getattr(author, share.kind)() for _ in range(size * self.AHEAD)]
        encoded = sorted(self._encode(rows), key=len)
        batches = [self._pack(encoded[i : i + size]) for i in range(0, len(encoded), size)]
        rng.shuffle(batches)
        return batches

    def _encode(self, rows: Sequence[Conversation]) -> list[Encoded]:
        texts = [text for row in rows for text in (row.prompt, row.answer + TURN_END)]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        return [Encoded(*parts) for parts in zip(rows, ids[::2], ids[1::2], strict=True)]

    def _pack(self, encoded: Sequence[Encoded]) -> Batch:
        shape = (len(encoded), max(len(item) for item in encoded))
        ids, labels = np.full(shape, self._pad), np.full(shape, IGNORED)
        positions = np.zeros((3, *shape), dtype=np.int64)
        for i, item in enumerate(encoded):
            length = len(item)
            ids[i, :length] = item.prompt + item.answer
            labels[i, len(item.prompt) : length] = item.answer
            row_ids = ids[i, :length]
            positions[:, i, :length] = rope_positions(row_ids, np.isin(row_ids, self._vision), runs(item.row))
        pictures = _pictures([item.row for item in encoded])
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions), pictures)
