"""Keys and values of every layer in tensors that never move, so that a decode step can be captured."""

from __future__ import annotations

from typing import Any

import torch

# Capacity grows by doubling from here, so that a longer prompt rarely needs new memory.
SMALLEST_CAPACITY = 1024


def capacity_for(tokens: int) -> int:
    """The smallest bucket that holds so many tokens."""
    return max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())


class KeyValues:
    """Rows are stored without their padding: slot i of a row is its token i, whatever the other rows hold.

    Attributes:
        keys, values: per layer (B, kv heads, capacity, head dim).
        lens: (B,) int64, tokens stored in each row. The next one goes into this slot.
        offset: (B,) int64, rotary position of a token minus its slot.
        bias: (B, 1, 1, capacity), 0 where a slot holds a token and -inf where not: the mask of a static step.
        filled: the longest row, known without asking the device.
        even: whether all rows are equally long, known without asking the device.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # One tensor per layer and kind: views of one large tensor would make torch.compile copy all of it.
        # (B, capacity, heads, dim) in memory, as flash kernels want it; everything else uses the transposed view.
        shape = (batch, capacity, heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(layers)]
        self.capacity = capacity
        self.batch = batch
        self.lens = torch.zeros(batch, dtype=torch.long, device=device)
        self.offset = torch.zeros(batch, dtype=torch.long, device=device)
        self.bias = torch.full((batch, 1, 1, capacity), float("-inf"), dtype=dtype, device=device)
        self.rows = torch.arange(batch, device=device)
        self.filled = 0
        self.even = True

    def fill(self, cache: Any, mask: torch.Tensor, offset: torch.Tensor, start: int = 0) -> None:
        """Take over a prefill.

        Args:
            cache: transformers' cache, layers[i].keys (B, heads, L, dim). Emptied on the way, layer by layer.
            mask: (B, L), 0 where a row is padded on its left.
            offset: (B,) rotary position of a row's next token minus the row's length.
            start: slots before this one hold what the cache holds already.
        """
        lengths = mask.sum(1).tolist()
        total = mask.shape[1]
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            for row, length in enumerate(lengths):
                begin = total - length + start
                keys[row, :, start:length] = layer.keys[row, :, begin:]
                values[row, :, start:length] = layer.values[row, :, begin:]
            layer.keys = layer.values = None
        self.lens.copy_(torch.tensor(lengths))
        self.offset.copy_(offset)
        slots = torch.arange(self.capacity, device=self.bias.device)
        self.bias.fill_(float("-inf")).masked_fill_((slots < self.lens[:, None])[:, None, None], 0.0)
        self.filled = max(lengths)
        self.even = len(set(lengths)) == 1

    def grown(self, capacity: int) -> KeyValues:
        """A larger copy."""
        batch, heads, _, dim = self.keys[0].shape
        larger = KeyValues(len(self.keys), batch, heads, dim, capacity, self.keys[0].dtype, self.keys[0].device)
        for old, new in ((self.keys, larger.keys), (self.values, larger.values)):
            for layer, tensor in enumerate(old):
                new[layer][:, :, : self.filled] = tensor[:, :, : self.filled]
        larger.bias[..., : self.capacity] = self.bias
        larger.lens.copy_(self.lens)
        larger.offset.copy_(self.offset)
        larger.filled, larger.even = self.filled, self.even
        return larger
