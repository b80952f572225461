"""Keys and values of every layer in tensors that never move, so that a decode step can be captured."""

from __future__ import annotations

from typing import Any

import torch

# Capacity grows by doubling from here, so that a longer prompt rarely needs new memory ...
SMALLEST_CAPACITY = 1024
# ... up to here, and by an eighth from then on, so that a long one does not take twice what it needs.
LARGEST_DOUBLING = 8192
# A masked step reads its whole span, and another span is another capture, a stall of up to a second in the middle of an
# answer. So a span has room for so many new tokens at first, which costs a twentieth where a text is near its end.
AHEAD = 256


def capacity_for(tokens: int) -> int:
    """The smallest bucket that holds so many tokens."""
    bucket = _doubled(tokens)
    return bucket if bucket <= LARGEST_DOUBLING else _rounded_up(tokens, bucket // 8)


def span_for(tokens: int) -> int:
    """How many slots a masked step looks at: few more than it needs, in few enough sizes to capture."""
    return _rounded_up(tokens, max(SMALLEST_CAPACITY, _doubled(tokens) // 8))


def _doubled(tokens: int) -> int:
    return max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())


def _rounded_up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step


class KVCache:
    """Rows are stored without their padding: slot i of a row is its token i, whatever the other rows hold.

    Attributes:
        keys, values: per layer (B, kv heads, capacity, head dim); none before the first fill.
        lens: (B,) int64, tokens stored in each row. The next one goes into this slot.
        offset: (B,) int64, rotary position of a token minus its slot.
        bias: (B, 1, 1, capacity), 0 where a slot holds a token and -inf where not: the mask of a static step.
        starts: (B + 1,) int32, 0 to B.
        filled: the longest row, known without asking the device.
        even: whether all rows are equally long, known without asking the device.
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
        """What one layer's keys or values are stored in.

        One tensor per layer and kind, so that a buffer grows layer by layer and is never there twice.
        (B, capacity, heads, dim) in memory, as flash kernels want it; everything else uses the transposed view.
        """
        shape = (self.batch, self.capacity, self._heads, self._head_dim)
        return torch.zeros(shape, dtype=self._dtype, device=self._device).transpose(1, 2)

    def fill(self, cache: Any, mask: torch.Tensor, offset: torch.Tensor, start: int = 0) -> None:
        """Take over a prefill.

        Args:
            cache: transformers' cache, layers[i].keys (B, heads, L, dim). Emptied on the way, layer by layer, and
                only then is memory taken for the next layer: a long prompt is never there twice.
            mask: (B, L), 0 where a row is padded on its left.
            offset: (B,) rotary position of a row's next token minus the row's length.
            start: slots before this one hold what the cache holds already.
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
        """A larger one with what this one holds, which is emptied on the way."""
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
