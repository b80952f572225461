"""Linear layers whose weights lie as one of torch's products for CPUs wants them.

Each is built from a plain layer's weight, computes the same product within its rounding, and takes any number of rows.
A step of decoding has one row, and its time is that of reading the weights once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import nn

# From this many rows on, a weight is made plain for the product: the time of that is that of a few rows.
_MANY_ROWS = 32
# Numbers of a weight that are converted at a time.
_LARGEST_BLOCK = 4 << 20


class CpuLinear(nn.Module):
    """A linear layer with a weight in another form.

    Attributes:
        in_features, out_features: as in nn.Linear.
        nbytes: bytes of the weight with its scales.
    """

    nbytes: int
    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product of rows (R, in) with the weight, bias added: (R, out)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what nn.Linear does: (..., in) to (..., out)."""
        rows = x.reshape(-1, self.in_features)
        return self.multiply(rows).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class OneDnnLinear(CpuLinear):
    """A bfloat16 weight in oneDNN's own order.

    Args:
        fill: fewer rows than this are filled up with copies: oneDNN's product is slower for a single row.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, fill: int = 4) -> None:
        super().__init__(weight, bias)
        self.nbytes = weight.nbytes
        self._fill = fill
        # Neither parameter nor buffer: tensors in this order can be neither compared, moved nor saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, fill)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product (R, out)."""
        count = len(rows)
        if count < self._fill:
            rows = rows.repeat(-(-self._fill // count), 1)
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")[:count]


class Int8Linear(CpuLinear):
    """An int8 weight with a scale for each row, multiplied in integers by fbgemm.

    An activation becomes two integers, the second for what the first one leaves: 15 bits. A single one of 8 bits loses
    what stands beside the large channels that language models have.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        quantized, scales = to_int8(weight)
        self._levels = activation_levels()
        # Keeps rows of zeros from being divided by zero.
        self._tiny = torch.full((1, 1), torch.finfo(torch.float32).tiny)
        self.nbytes = quantized.nbytes + scales.nbytes
        self._packed = _packed_int8(quantized, scales)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product (R, out)."""
        count = len(rows)
        # Where one of two is float32, so is the result: no copy in float32 is needed before.
        scales = torch.add(self._tiny, rows.abs().amax(-1, keepdim=True), alpha=1 / self._levels)
        scaled = rows / scales
        coarse = scaled.round()
        both = torch.cat((coarse, scaled.sub_(coarse).mul_(2 * self._levels)))
        product = _int8_product(both, self._levels, self._packed)
        result = product[:count].add_(product[count:], alpha=0.5 / self._levels).mul_(scales)
        return (result if self.bias is None else result.add_(self.bias)).to(rows.dtype)


class Int8WeightLinear(CpuLinear):
    """An int8 weight with a scale for each row, multiplied with activations that stay as they are."""

    _quantized: torch.Tensor
    _scales: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        quantized, scales = to_int8(weight)
        self.register_buffer("_quantized", quantized)
        self.register_buffer("_scales", scales.to(weight.dtype))
        self.nbytes = quantized.nbytes + self._scales.nbytes

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product (R, out)."""
        if len(rows) >= _MANY_ROWS:
            return F.linear(rows, self._quantized * self._scales[:, None], self.bias)
        result = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self._quantized, self._scales)
        return result if self.bias is None else result.add_(self.bias)


@functools.cache
def activation_levels() -> int:
    """Return the largest integer that an activation may become: 127, or 63 where two products are added in 16 bits."""
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    product = _int8_product(torch.full((1, 64), 127.0), 127, _packed_int8(weight, torch.ones(16)))
    return 127 if torch.equal(product, torch.full((1, 16), 127.0 * 127 * 64)) else 63


def _packed_int8(quantized: torch.Tensor, scales: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        # torch is going to replace its quantized tensors; choice.works() finds out when this product is gone.
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(scales), dtype=torch.long)
        as_quantized = torch._make_per_channel_quantized_tensor(quantized, scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(as_quantized, None)


def _int8_product(integers: torch.Tensor, levels: int, packed: Any) -> torch.Tensor:
    """Multiply float32 rows that hold integers from -levels to levels."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(integers, 1.0, levels + 1, packed)


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight (out, in) row by row: int8 of the same shape, and float32 scales (out,)."""
    low, high = weight.aminmax(dim=1)
    scales = torch.maximum(-low, high).float().div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    quantized = torch.empty(weight.shape, dtype=torch.int8)
    for rows in row_blocks(weight):
        quantized[rows] = (weight[rows] / scales[rows, None]).round_()
    return quantized, scales


def row_blocks(weight: torch.Tensor, multiple: int = 64) -> Iterator[slice]:
    """Yield blocks of a weight's rows, so that intermediate results of a large one take tens of megabytes."""
    step = max(1, _LARGEST_BLOCK // (weight.shape[1] * multiple)) * multiple
    yield from (slice(start, start + step) for start in range(0, len(weight), step))


class Joined(nn.Module):
    """Layers with the same input as one: a single product of a larger weight is faster than several.

    Args:
        layer: the layer whose weight is theirs, one below the other.
        sizes: rows of each.
    """

    def __init__(self, layer: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self._sizes = sizes
        self._input: torch.Tensor | None = None
        self._products: tuple[torch.Tensor, ...] = ()
        self._waiting: set[int] = set()

    def parts(self) -> list[Part]:
        """Return what stands where the layers stood."""
        return [Part(self, index, size) for index, size in enumerate(self._sizes)]

    def product(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return the part's share of the product; the first part that is asked computes those of the others too."""
        if self._input is not x or index not in self._waiting:
            self._products = self.layer(x).split(self._sizes, -1)
            self._input, self._waiting = x, set(range(len(self._sizes)))
        self._waiting.discard(index)
        result = self._products[index]
        if not self._waiting:
            self._input, self._products = None, ()
        return result


class Part(nn.Module):
    """One of the layers that were joined. All of them are called with the same tensor, one after the other."""

    def __init__(self, whole: Joined, index: int, out_features: int) -> None:
        super().__init__()
        self.whole = whole
        self.in_features, self.out_features = whole.layer.in_features, out_features
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what nn.Linear does."""
        return self.whole.product(x, self._index)


def joined(layers: list[nn.Module]) -> nn.Module | None:
    """Return the layer that computes all of these, or None if they were not joined."""
    first = layers[0]
    if not isinstance(first, Part) or any(getattr(layer, "whole", None) is not first.whole for layer in layers):
        return None
    return first.whole.layer
