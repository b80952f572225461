"""Keys and values of every layer in tensors that never move, so that a decode step can be captured."""

from __future__ import annotations

from typing import Any

import torch

# Smallest capacity, in tokens. It doubles from here, so that a longer prompt rarely needs new memory.
SMALLEST_CAPACITY = 1024
# Above this the capacity grows by an eighth, so that a long prompt does not take twice the memory that it needs.
LARGEST_DOUBLING = 8192
# New tokens for which a span has room at first. A masked step reads its whole span, and a new span is a new capture: a
# stall of up to a second in the middle of an answer. The spare room costs a twentieth if the text ends soon.
AHEAD = 256


def capacity_for(tokens: int) -> int:
    """Return the smallest capacity, in tokens, that holds this number of tokens."""
    bucket = _doubled(tokens)
    return bucket if bucket <= LARGEST_DOUBLING else _rounded_up(tokens, bucket // 8)


def span_for(tokens: int) -> int:
    """Return how many slots a masked step reads: slightly more than needed, so that there are few sizes to capture."""
    return _rounded_up(tokens, max(SMALLEST_CAPACITY, _doubled(tokens) // 8))


def _doubled(tokens: int) -> int:
    return max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())


def _rounded_up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step


class KVCache:
    """Keys and values of a batch, stored without padding: slot i of a row holds its token i.

    Attributes:
        keys, values: per layer (B, kv heads, capacity, head dim); empty lists before the first fill.
        lens: (B,) int64, tokens stored in each row, and so the slot of its next token.
        offset: (B,) int64, rotary position of a token minus its slot.
        bias: (B, 1, 1, capacity), 0 where a slot holds a token and -inf where not: the mask of a static step.
        starts: (B + 1,) int32, 0 to B.
        filled: length of the longest row, known without asking the device.
        even: True if all rows are equally long, known without asking the device.
    """

    def __init__(
        self, batch: int, heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._heads, self._head_dim, self._dtype, self._device = heads, head_dim, dtype, device
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.capacity = capacity
        self.batch = batch
        self.lens = torch.zeros(batch, dtype=torch.long, device=device)
        self.offset = torch.zeros(batch, dtype=torch.long, device=device)
        self.bias = torch.full((batch, 1, 1, capacity), float("-inf"), dtype=dtype, device=device)
        self.rows = torch.arange(batch, device=device)
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.filled = 0
        self.even = True

    def allocate(self) -> torch.Tensor:
        """Return zeros for one layer's keys or values, (B, heads, capacity, dim).

        One tensor per layer and kind lets a buffer grow layer by layer, so that it is never in memory twice.
        On a GPU it is (B, capacity, heads, dim) in memory, as flash kernels want it, and this is the transposed view.
        On a CPU each head's tokens stand together: measured, a step over 16,000 tokens takes half of the time.
        """
        on_cpu = self._device.type == "cpu"
        sizes = (self._heads, self.capacity) if on_cpu else (self.capacity, self._heads)
        stored = torch.zeros((self.batch, *sizes, self._head_dim), dtype=self._dtype, device=self._device)
        return stored if on_cpu else stored.transpose(1, 2)

    def fill(self, cache: Any, mask: torch.Tensor, offset: torch.Tensor, start: int = 0) -> None:
        """Take over the keys and values of a prefill.

        Args:
            cache: transformers' cache, layers[i].keys (B, heads, L, dim). It is emptied layer by layer, and only then
                is memory taken for the next layer: a long prompt is never in memory twice.
            mask: (B, L), 0 where a row is padded on its left.
            offset: (B,) rotary position of a row's next token minus the row's length.
            start: the slots before this one hold their tokens already and are not copied.
        """
        lengths = mask.sum(1).tolist()
        total = mask.shape[1]
        for index, layer in enumerate(cache.layers):
            if index == len(self.keys):
                self.keys.append(self.allocate())
                self.values.append(self.allocate())
            for row, length in enumerate(lengths):
                begin = total - length + start
                self.keys[index][row, :, start:length] = layer.keys[row, :, begin:]
                self.values[index][row, :, start:length] = layer.values[row, :, begin:]
            layer.keys = layer.values = None
        self.lens.copy_(torch.tensor(lengths))
        self.offset.copy_(offset)
        slots = torch.arange(self.capacity, device=self.bias.device)
        self.bias.fill_(float("-inf")).masked_fill_((slots < self.lens[:, None])[:, None, None], 0.0)
        self.filled = max(lengths)
        self.even = len(set(lengths)) == 1

    def grown(self, capacity: int) -> KVCache:
        """Move the contents into a larger cache and return that; this one is emptied layer by layer."""
        larger = KVCache(self.batch, self._heads, self._head_dim, capacity, self._dtype, self._device)
        for old, new in ((self.keys, larger.keys), (self.values, larger.values)):
            while old:
                new.insert(0, larger.allocate())
                new[0][:, :, : self.filled] = old.pop()[:, :, : self.filled]
        larger.bias[..., : self.capacity] = self.bias
        larger.lens.copy_(self.lens)
        larger.offset.copy_(self.offset)
        larger.filled, larger.even = self.filled, self.even
        return larger
