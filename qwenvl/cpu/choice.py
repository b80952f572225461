"""The choice of a form for weights: measured once on this CPU with this torch, and remembered in the user's folder."""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ..files.bounded_json import UnreadableError, read_json_object
from ..log import log
from .int4 import Int4Linear
from .linear import Int8Linear, Int8WeightLinear, OneDnnLinear

# Builds a layer from a weight (out, in) and a bias.
Build = Callable[[torch.Tensor, "torch.Tensor | None"], nn.Module]

PLAIN = "plain"
# Bytes of the weights that are read in one round of a measurement: more than caches hold.
_BEYOND_CACHES = 96 << 20
# Larger weights are measured by a part of this many bytes.
_LARGEST = 24 << 20
_ROUNDS = 5
# The plain form stays unless another one is faster by this factor: packing takes time, and memory while it happens.
_WORTH = 1.1


def plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """Return the usual layer with that weight; nothing is copied."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def filled(rows: int) -> Build:
    """Return what builds a OneDnnLinear that fills up to this many rows."""
    return lambda weight, bias: OneDnnLinear(weight, bias, rows)


HALF: Mapping[str, Build] = {
    PLAIN: plain,
    "oneDNN": filled(1),
    "oneDNN, 4 rows": filled(4),
    "oneDNN, 6 rows": filled(6),
}
EIGHT: Mapping[str, Build] = {"int8 twice": Int8Linear, "int8 weight": Int8WeightLinear}
FOUR: Mapping[str, Build] = {PLAIN: plain, "int4": Int4Linear}


class Choices:
    """The fastest form of a weight for one row, by kind and shape.

    Args:
        file: where measurements are kept; None keeps them in memory.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._known: dict[str, str] = {}
        if file is not None and file.is_file():
            with suppress(UnreadableError, OSError):
                self._known = {key: name for key, name in read_json_object(file).items() if isinstance(name, str)}

    def fastest(self, ways: Mapping[str, Build], rows: int, columns: int, dtype: torch.dtype) -> str:
        """Return the name of the way that multiplies one row by a weight (rows, columns) the fastest.

        A way that this torch lacks, or that computes something else, is left out. PLAIN is returned if none is left.
        """
        rows = max(1, min(rows, _LARGEST // (columns * dtype.itemsize)))
        key = f"{_this_machine()}, {dtype}, {rows} x {columns}: {', '.join(ways)}"
        if self._known.get(key) not in (*ways, PLAIN):
            started = time.perf_counter()
            self._known[key] = _measured(ways, rows, columns, dtype)
            log.debug("%s: %s, in %.2f s", key, self._known[key], time.perf_counter() - started)
            self._keep()
        return self._known[key]

    def _keep(self) -> None:
        if self._file is None:
            return
        part = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        # Where the folder cannot be written, the next start measures again.
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
            part.replace(self._file)


def works(build: Build, dtype: torch.dtype) -> bool:
    """Return True if this torch has the product of that form, and it computes what the plain product does."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=random).to(dtype)
    x = torch.randn(3, 256, generator=random).to(dtype)
    # One large channel, as language models have them.
    x[:, 7] = 50
    expected = x.float() @ weight.float().t()
    try:
        found = build(weight, None)(x).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    # Numbers of 4 bits are off by a tenth.
    return bool((found - expected).norm() <= 0.15 * expected.norm())


def _measured(ways: Mapping[str, Build], rows: int, columns: int, dtype: torch.dtype) -> str:
    count = max(2, -(-_BEYOND_CACHES // (rows * columns * dtype.itemsize)))
    weights = [torch.full((rows, columns), 0.01, dtype=dtype) for _ in range(count)]
    x = torch.full((1, columns), 0.5, dtype=dtype)
    layers = {
        name: [build(weight, None) for weight in weights]
        for name, build in ways.items()
        if name == PLAIN or works(build, dtype)
    }
    # In turns, and the best of them: other programs slow down some of the rounds.
    rounds = [{name: _round(copies, x) for name, copies in layers.items()} for _ in range(_ROUNDS)]
    seconds = {name: min(found[name] for found in rounds) for name in layers}
    if PLAIN in seconds:
        seconds[PLAIN] /= _WORTH
    return min(seconds, key=seconds.__getitem__) if seconds else PLAIN


@torch.inference_mode()
def _round(layers: list[nn.Module], x: torch.Tensor) -> float:
    # With one thread, other programs' time is left out.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for layer in layers:
        layer(x)
    return clock() - started


def _this_machine() -> str:
    return f"{_cpu()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


@functools.cache
def _cpu() -> str:
    """Return the processor's name; platform.processor() is empty on most Linux systems."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
