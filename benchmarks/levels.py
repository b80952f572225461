"""Measures what a process holds (memory, files, threads, tensors, models) and finds growth. For soak.py and tests."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from qwenvl.loading import loader

# Bounds of growth: a file, a thread or a few tensors may come late, but only once; a leak grows again and again.
MORE_FILES, MORE_THREADS, MORE_TENSORS = 2, 1, 16
MORE_TENSOR_BYTES = 1 << 20
MORE_RESIDENT = 0.05


@dataclass(frozen=True, slots=True)
class Levels:
    """What the process holds at a moment at which no model is held."""

    resident_bytes: int
    files: int
    threads: int
    tensors: int
    tensor_bytes: int
    models: int

    def growth(self, since: Levels, resident: bool = True) -> list[str]:
        """Return a sentence for each figure that has grown beyond its bound.

        Args:
            resident: compare the memory of the whole process too, which settles only after hundreds of runs.
        """
        bounds = {
            "files": since.files + MORE_FILES,
            "threads": since.threads + MORE_THREADS,
            "tensors": since.tensors + MORE_TENSORS,
            "tensor_bytes": since.tensor_bytes + MORE_TENSOR_BYTES,
            "models": 0,
        }
        if resident:
            bounds["resident_bytes"] = round(since.resident_bytes * (1 + MORE_RESIDENT))
        now, before = asdict(self), asdict(since)
        return [
            f"{name}: {now[name]} where there were {before[name]}, and at most {most} may be"
            for name, most in bounds.items()
            if now[name] > most
        ]


def look(alive: list[weakref.ref]) -> Levels:
    """Collect garbage, and return the present levels.

    Args:
        alive: the list that watched_loads yields.
    """
    gc.collect()
    process = psutil.Process()
    # By type and not by isinstance, which would make lazy objects of other libraries load.
    tensors = [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
    # By address, because many tensors may be views of the same memory.
    stored = dict(filter(None, map(_stored, tensors)))
    return Levels(
        resident_bytes=process.memory_info().rss,
        files=process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        threads=threading.active_count(),
        tensors=len(tensors),
        tensor_bytes=sum(stored.values()),
        models=sum(model() is not None for model in alive),
    )


@contextmanager
def watched_loads() -> Iterator[list[weakref.ref]]:
    """Collect weak references to every model that is loaded within the block."""
    alive: list[weakref.ref] = []
    real = loader.load

    def load(*arguments: Any) -> loader.ModelHandle:
        handle = real(*arguments)
        alive.append(weakref.ref(handle.model))
        return handle

    loader.load = load
    try:
        yield alive
    finally:
        loader.load = real


def _stored(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return address and bytes of a tensor's memory; None if it has none, as a fake tensor of torch's compiler."""
    try:
        storage = tensor.untyped_storage()
        return (storage.data_ptr(), storage.nbytes()) if storage.data_ptr() else None
    except (NotImplementedError, RuntimeError):
        return None
