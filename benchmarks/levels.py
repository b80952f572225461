"""What a process holds: memory, files, threads, tensors, models; and whether that has grown. For soak.py and tests."""

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

# A file, a thread or a few tensors may come late and once; what leaks does so again and again.
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
        """A sentence for each figure that has grown beyond its bound.

        Args:
            resident: look at the memory of the whole process too, which settles within hundreds of runs only.
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
    """The levels now, of what is still in use: garbage is collected first.

    Args:
        alive: of watched_loads.
    """
    gc.collect()
    process = psutil.Process()
    # Types and not isinstance, which would have lazy objects of others make themselves.
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    # By address: many tensors may be views of one memory.
    stored = dict(filter(None, map(_stored, tensors)))
    return Levels(
        resident_bytes=process.memory_info().rss,
        files=process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        threads=threading.active_count(),
        tensors=len(tensors),
        tensor_bytes=sum(stored.values()),
        models=sum(each() is not None for each in alive),
    )


@contextmanager
def watched_loads() -> Iterator[list[weakref.ref]]:
    """Weak references to every model that is loaded within the block."""
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
    """Address and bytes of what it lies in; None where it lies nowhere, as those by which torch's compiler plans."""
    try:
        storage = tensor.untyped_storage()
        return (storage.data_ptr(), storage.nbytes()) if storage.data_ptr() else None
    except (NotImplementedError, RuntimeError):
        return None
