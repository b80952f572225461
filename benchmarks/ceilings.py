"""Measures a device's limits: bytes per second of its memory, and operations per second of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qwenvl.cli.doctor import copy_bandwidth

TIMES = 7
# Sizes of the buffers: a small one would be read from a GPU's cache, and a short kernel does not reach full speed.
GPU_BYTES, CPU_BYTES = 4 << 30, 256 << 20
COLUMNS = 8192
GPU_SIDE, CPU_SIDE = 8192, 512


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best of a few tries: bytes read (and written, in a copy) and floating-point operations, per second."""

    copy_bytes_per_s: float
    sum_bytes_per_s: float
    matrix_vector_bytes_per_s: float
    matrix_product_flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """Return the fastest of three ways to read memory, so that no share of it is too high."""
        return max(self.copy_bytes_per_s, self.sum_bytes_per_s, self.matrix_vector_bytes_per_s)

    def figures(self) -> dict[str, float]:
        return {
            name: float(f"{value:.4g}") for name, value in (*asdict(self).items(), ("bytes_per_s", self.bytes_per_s))
        }


def ceiling(device: str, dtype: torch.dtype) -> Ceiling:
    """Measure the device ("cuda" or "cpu") in the dtype that the model computes in."""
    with torch.inference_mode():
        sums, products = _bytes_read_per_s(device, dtype)
        return Ceiling(copy_bandwidth(device), sums, products, _flops_per_s(device, dtype))


def _bytes_read_per_s(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measure by a sum, and by a matrix-vector product, which is most of a decode step."""
    matrix = torch.ones(_bytes(device) // dtype.itemsize // COLUMNS, COLUMNS, dtype=dtype, device=device)
    vector = torch.ones(COLUMNS, dtype=dtype, device=device)
    size = matrix.numel() * matrix.element_size()
    sums = best_seconds(lambda: matrix.view(torch.float32).sum(), device)
    return size / sums, size / best_seconds(lambda: torch.mv(matrix, vector), device)


def _flops_per_s(device: str, dtype: torch.dtype) -> float:
    side = GPU_SIDE if device == "cuda" else CPU_SIDE
    square = torch.randn(side, side, dtype=dtype, device=device)
    return 2 * side**3 / best_seconds(lambda: square @ square, device)


def best_seconds(work: Callable[[], Any], device: str) -> float:
    """Return the shortest of a few tries, after one that does not count; on a GPU by its own clock."""
    work()
    return min(_seconds(work, device) for _ in range(TIMES))


def _seconds(work: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _bytes(device: str) -> int:
    """Return the buffer's size; it is smaller if other programs use the GPU."""
    return min(GPU_BYTES, torch.cuda.mem_get_info()[0] // 4) if device == "cuda" else CPU_BYTES
