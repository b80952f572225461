"""A linear layer with a 4-bit weight: groups of a row share a scale and a zero point."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .linear import CpuLinear, row_blocks

# Sizes of a group that torch's product takes.
GROUPS = (128, 64, 32)
# torch's product stores 4 bits as 0 to 15, of which this one stands for zero.
_MIDDLE = 8
# Rows of a weight are packed in blocks; in an incomplete one the order would be another.
_BLOCK = 64
# From this many rows on, the weight is made plain for the product: that costs as much as this many rows.
_MANY_ROWS = 96


class Int4Linear(CpuLinear):
    """A weight in 4 bits, with a scale and a zero point for each group of a row.

    A product with few rows is computed in bfloat16, for which torch has a fast one.

    Args:
        group: columns that share a scale; it divides the columns of the weight.
    """

    _packed: torch.Tensor
    _scales_and_zeros: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, group: int = 32) -> None:
        super().__init__(weight, bias)
        self._group = group
        parts = [_packed_block(weight[rows], group) for rows in row_blocks(weight, _BLOCK)]
        self.register_buffer("_packed", torch.cat([numbers for numbers, _ in parts]))
        self.register_buffer("_scales_and_zeros", torch.cat([scales for _, scales in parts], 1))
        self.nbytes = self._packed.nbytes + self._scales_and_zeros.nbytes

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product (R, out)."""
        dtype = rows.dtype
        if len(rows) >= _MANY_ROWS and (unpack := unpacking()):
            result = rows @ self._plain(unpack, dtype)
        else:
            result = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.bfloat16().contiguous(), self._packed, self._group, self._scales_and_zeros
            )
        result = result[:, : self.out_features].to(dtype)
        return result if self.bias is None else result + self.bias

    def _plain(self, unpack: Unpacking, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as plain numbers, transposed: (in, out, filled up)."""
        rows = self._packed.shape[0]
        numbers = unpack(self._packed, self.in_features).to(dtype).sub_(_MIDDLE)
        scales, zeros = self._scales_and_zeros.to(dtype).unbind(-1)
        grouped = numbers.view(-1, self._group, rows)
        return torch.addcmul(zeros[:, None], grouped, scales[:, None]).view(self.in_features, rows)


def _packed_block(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return torch's packed form of a block of rows, filled up, and its scales and zeros (in / group, rows, 2)."""
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % _BLOCK))
    numbers, scales_and_zeros = to_int4(filled, group)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1), scales_and_zeros


# packed bytes, columns of the weight -> numbers from 0 to 15, (in, out) uint8
Unpacking = Callable[[torch.Tensor, int], torch.Tensor]


def to_int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight (out, in).

    Returns:
        Numbers from 0 to 15, (out, in) int32; and (in / group, out, 2) in bfloat16: a number q of a group stands for
        (q - 8) * scale + zero.
    """
    grouped = weight.float().view(len(weight), -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    # Rounded as they are stored, so that the numbers make up for it.
    scale = ((high - low) / 15).bfloat16().float().clamp_min_(torch.finfo(torch.bfloat16).tiny)
    zero = (low + _MIDDLE * scale).bfloat16().float()
    numbers = ((grouped - zero) / scale).round_().add_(_MIDDLE).clamp_(0, 15)
    pairs = torch.cat((scale, zero), -1).bfloat16().transpose(0, 1).contiguous()
    return numbers.view(weight.shape).to(torch.int32), pairs


@functools.cache
def unpacking() -> Unpacking | None:
    """Return what reads torch's packed form on this CPU, found by trying; None if it is one that is not known here."""
    numbers = torch.arange(2 * _BLOCK * 32, dtype=torch.int32).mul_(7).remainder_(16).view(2 * _BLOCK, 32)
    numbers[::3] = 15 - numbers[::3]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    known = (functools.partial(_halves, block=64), functools.partial(_halves, block=32), _pairs)
    return next((way for way in known if torch.equal(way(packed, 32).int(), numbers.t())), None)


def _halves(packed: torch.Tensor, columns: int, block: int) -> torch.Tensor:
    """Read blocks of rows of which a byte holds one of the first half and one of the second."""
    blocks = packed.view(torch.uint8).view(-1, columns, block // 2)
    # (blocks, columns, block) -> (columns, blocks * block)
    return torch.cat((blocks & 15, blocks >> 4), -1).transpose(0, 1).reshape(columns, -1)


def _pairs(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Read blocks of 32 rows of which a byte holds two that follow each other."""
    blocks = packed.view(torch.uint8).view(-1, columns, 16)
    return torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).transpose(0, 1).reshape(columns, -1)
